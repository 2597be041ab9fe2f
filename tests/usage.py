"""What a script of tests/ takes from its command line: --help answers, an unknown flag is refused, and nothing has begun."""
import argparse

REST = argparse.REMAINDER


def arguments(doc, **options):
    """The values of a script's arguments in their order; options: {name: what add_argument takes}."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, more in options.items():
        parser.add_argument(name, **more)
    return list(vars(parser.parse_args()).values())
