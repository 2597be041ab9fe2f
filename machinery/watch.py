"""A run while it goes: how long it still takes, metrics.png, and another program that is told each logged row (--track).

Everything is drawn from metrics.jsonl, on rank 0 (docs/watching.md).
"""
import argparse
import hashlib
import importlib.util
import math
import os
import time

from machinery import files, report

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


def tracker(name):
    """What --track names, if it is installed."""
    if name not in PACKAGES:
        raise argparse.ArgumentTypeError(f"must be {' or '.join(PACKAGES)}, not {name}")
    if importlib.util.find_spec(PACKAGES[name]) is None:
        raise argparse.ArgumentTypeError(f"the package {name} is not installed: pip install {PACKAGES[name]}")
    return name


FLAGS = {"track": dict(type=tracker, default=None, metavar="tensorboard|wandb", help="show every logged row there, too")}
TRACK = {"with": None}  # what --track names
OPEN = {}  # of each run's folder its writer


def track(out, row, number):
    """Give a row of metrics.jsonl, the number-th, to --track's program; its numbers are called phase/name there."""
    values = {}
    for name, value in row.items():
        if isinstance(value, (int, float)) and name not in ("iteration", "step", "wave"):
            values[f"{row['phase']}/{'wave ' if 'wave' in row else ''}{name}"] = value
    if TRACK["with"] == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        if out not in OPEN:  # of a run that resumes, what metrics.jsonl has lost goes there as well
            OPEN[out] = SummaryWriter(os.path.join(out, "tensorboard"), purge_step=number, flush_secs=10)
        for name, value in values.items():
            OPEN[out].add_scalar(name, value, number)
    elif TRACK["with"] == "wandb":
        import wandb

        if out not in OPEN:
            same = hashlib.sha256(os.path.realpath(out).encode()).hexdigest()[:16]  # so that a resumed run is one run
            OPEN[out] = wandb.init(project="refuel", name=out, id=same, resume="allow", dir=out, reinit="create_new",
                                   config=files.read_json(os.path.join(out, "config.json")))  # fmt: skip
        OPEN[out].log(values, step=number)


# ---------------------------------------------------------------------------------------------------------------
# The time that is left
# ---------------------------------------------------------------------------------------------------------------

PHASES = ("collect", "logps", "regress")


class Clock:
    """How long a training still takes, from what its phases have taken so far.

    seconds: of each phase its last whole one; a run that resumes reads them from its log."""

    def __init__(self, iterations, rows=()):
        self.iterations = iterations
        self.seconds = {row["phase"]: row["seconds"] for row in rows if "seconds" in row and row["phase"] in PHASES}

    def left(self, t, phase, done, todo, spent):
        """In words: done of this phase's pieces took `spent` seconds, todo are left. A "more than" stands before it as
        long as a phase has not been seen; the evaluation is not in it."""
        known = self.seconds | {phase: spent / done * (done + todo)}
        later = PHASES[PHASES.index(phase) + 1 :]
        seconds = spent / done * todo + sum(known.get(name, 0) for name in later)
        seconds += (self.iterations - t) * sum(known.values())
        unseen = (t < self.iterations and len(known) < len(PHASES)) or set(later) - set(known)
        return ("more than " if unseen else "") + hours_and_minutes(seconds) + " left"

    def finished(self, phase, seconds):
        self.seconds[phase] = seconds


def hours_and_minutes(seconds):
    """
    >>> hours_and_minutes(59), hours_and_minutes(3600 * 26 + 300)
    ('59 s', '26 h 5 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# ---------------------------------------------------------------------------------------------------------------
# metrics.png
# ---------------------------------------------------------------------------------------------------------------

# Panel: {metric: the phase whose rows have it}; its first one is the panel's name
CURVES = {
    "reward": {"reward": "collect"},
    "loss": {"loss": "regress"},
    "sign agreement": {"sign_agreement": "regress", "held_out_sign_agreement": "regress"},
    "held-out loss": {"held_out_loss": "regress"},
    "KL to pi_t, nats a response": {"kl": "regress", "kl_own": "logps"},
    "cut answers, share": {"truncated": "collect", "malformed": "collect"},
}


def curves(rows):
    """{panel: {metric: [(x, value)]}} of the rows of a metrics.jsonl, empty ones left out.

    x is in iterations: a phase's rows lie evenly between t - 1 and t, its only one at t, but for kl_own, which is what the
    iteration before has done; of waves' rows and the whole collection's the waves' are drawn, where there are any."""
    found = {}
    for panel, metrics in CURVES.items():
        for metric, phase in metrics.items():
            groups = {}
            for row in rows:
                if row["phase"] == phase and metric in row and math.isfinite(row[metric]):
                    groups.setdefault(row["iteration"], []).append(row)
            points = []
            for t, group in groups.items():
                waves = [row for row in group if "wave" in row]
                group = waves if waves else group
                for n, row in enumerate(group, 1):
                    points.append((t - 1 if phase == "logps" else round(t - 1 + n / len(group), 4), row[metric]))
            if points:
                found.setdefault(panel, {})[metric] = points
    return found


def draw(out):
    """metrics.png of a run's folder, from its metrics.jsonl."""
    found = curves(files.read_lines(os.path.join(out, "metrics.jsonl"), torn=True))
    figure, axes = report.panels(3, 10, 5.2, rows=2)
    for ax, panel in zip(axes.flat, CURVES):
        for metric, points in found.get(panel, {}).items():
            ax.plot(*zip(*points), ".-" if len(points) < 50 else "-", lw=1, ms=4, label=metric)
        ax.set_title(panel, fontsize=9)
        ax.tick_params(labelsize=7)
        ax.ticklabel_format(useOffset=False)
        ax.spines[["top", "right"]].set_visible(False)
        if len(found.get(panel, {})) > 1:
            ax.legend(frameon=False, fontsize=7)
    for ax in axes[1]:
        ax.set_xlabel("iteration", fontsize=8)
    report.save(figure, os.path.join(out, "metrics.png"))


EVERY = 60  # seconds between two drawings within a phase
SHARE = 0.01  # of a run's time that drawings may take
DRAWN = {"at": time.monotonic(), "seconds": 1.0}  # the end of the last drawing, or the start; what it took


def redraw(out, phase_ends=False, last=False):
    """Draw metrics.png where it is time to: at a phase's end or a minute after the last drawing, if drawing has had less
    than a hundredth of the time since then; and when the training is at its end."""
    waited = time.monotonic() - DRAWN["at"]
    due = waited * SHARE >= DRAWN["seconds"] and (phase_ends or waited >= EVERY)
    if due or last:
        start = time.monotonic()
        draw(out)
        DRAWN.update(at=time.monotonic(), seconds=time.monotonic() - start)
