"""python tests/kills.py kill|full OUT FLAGS: run refuel.py into OUT.undisturbed, then into OUT, where the same command is
started again until it ends.

kill: each attempt is a process that dies by SIGKILL just before a rename (the file is there under its temporary name
only), the next one just after it; so too within and after a line of the log. full: each attempt meets a full disk at a
kind of file that no attempt has met before: the kernel takes no byte more, whatever library writes. Both hold out pairs
of few.
Prints the number of attempts that did not end."""
import json
import os
import re
import resource
import signal
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from usage import REST, arguments
from machinery import ranks  # noqa: F401  (first: it sets what torch reads when it is imported)

import forked  # noqa: F401  (imports what takes seconds, so that no attempt has to)
from machinery import files, held_out, page, watch
import refuel
from simulator import prepare


def attempt(how, argv, seen):
    """Run the command in a child that stops at the first file that is not in the list `seen`; returns its status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    watch.draw, page.write = lambda out: None, lambda folder: None  # pictures, a second each, that nobody reads back
    held_out.FEWEST = 2
    rename, writing, append = os.replace, files.writing, files.append_line
    before = set(open(seen).read().split("\n"))

    def fill(kind):
        if kind not in before:
            with open(seen, "a") as file:
                file.write(f"{kind}\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))

    def no_room(path):
        fill(re.sub(r"\d+", "N", os.path.basename(path)))
        return writing(path)

    def no_line(path, row):
        fill(f"{os.path.basename(path)}:line")
        append(path, row)

    def die(moment, target):
        if f"{moment} {target}" not in before:
            with open(seen, "a") as file:
                file.write(f"{moment} {target}\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def replace(source, target):
        again = "eval/iter_1." in target  # the last policy's evaluation is the same once more
        sealed = target.endswith(".sha256") or os.path.exists(f"{target}.sha256")
        if not (again or sealed):  # before a file that has a checksum is the moment after its checksum
            die("before", target)
        rename(source, target)
        if not again:
            die("after", target)

    def half_a_line(path, row):
        if f"within {path}" not in before:
            with open(path, "a") as file:
                file.write(json.dumps(row)[:20])
            die("within", path)
        append(path, row)
        die("after a line of", path)

    if how == "kill":
        os.replace, files.append_line = replace, half_a_line
    if how == "full":
        files.writing, files.append_line = no_room, no_line
    try:
        refuel.main(argv)
    except SystemExit as stop:
        sys.stderr.flush()
        os._exit(stop.code)
    os._exit(0)


if __name__ == "__main__":
    how, out, flags = arguments(__doc__, how=dict(choices=["kill", "full"]), out={}, flags=dict(nargs=REST))
    seen, stops = f"{out}.seen", 0
    open(seen, "w").close()
    prepare(refuel.read_config(["--out", out, *flags]))  # prompts and template are read once, not by each attempt
    undisturbed = attempt("none", ["--out", f"{out}.undisturbed", *flags], seen)
    if undisturbed:
        sys.exit(os.waitstatus_to_exitcode(undisturbed))
    expected = signal.SIGKILL if how == "kill" else 2 << 8
    while (status := attempt(how, ["--out", out, *flags], seen)) == expected and stops < len(open(seen).readlines()):
        stops += 1
    print(f"stops {stops}: {open(seen).read().split()}")
    sys.exit(os.waitstatus_to_exitcode(status))
