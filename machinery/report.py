"""What a person sees: tables in Markdown, figures, two dialogues side by side, pairs and dialogues as text.

A row of results is evaluate.py's, {name: {"win": [h = 1..H], "low", "high", "avg", ...}}; whole dialogues have one column.
"""
import os
import shutil
import textwrap
from itertools import zip_longest

import numpy as np

from machinery import files

# ---------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------


def markdown(heads, rows):
    """The lines of a Markdown table."""
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return lines


def turn_heads(results):
    """A heading for each column of win rates."""
    columns = len(next(iter(results.values()))["win"])
    return [f"h = {h}" for h in range(1, columns + 1)] if columns > 1 else ["whole dialogue"]


def whole_dialogues(played):
    """Appendix D: one opening as every policy played it, whole turns, in Markdown; played: {policy: its dialogue}."""
    lines = []
    for name, dialogue in played.items():
        lines += ["", f"**{name}**", ""]
        lines += [f"- {m['role']}: {' '.join(m['content'].split())}" for m in dialogue.messages]
    return "\n".join(lines)


def win_cells(row, paper=()):
    """Win rate and interval of each turn and of their average, the paper's number in brackets behind it if there is one."""
    values = [*zip(row["win"], row["low"], row["high"]), (row["avg"], row["avg_low"], row["avg_high"])]
    cells = []
    for i, (win, low, high) in enumerate(values):
        cells.append(f"{win:.1f} [{low:.1f}, {high:.1f}]" + (f" ({paper[i]:.1f})" if paper else ""))
    return cells


def footer(results):
    """What an interval is, and how far it can be trusted; and whose answers ended at the token limit.

    Of 12 to 16 dialogues a 95 % interval holds the truth in 88 to 96 % of cases, and that from 30 to 70 % alone. At any
    number of dialogues it is too narrow near 0 and 100 %: with 10 expected losses (or wins) and more it holds in 91 to
    96 %, with 3 to 5 in 81 to 95, with one in 65 or less, since a clean sweep's interval has no width (verdicts of 0 and 1,
    the binomial's exact sum; tests/test_evaluate.py)."""
    dialogues = min(row["dialogues"] for row in results.values())
    few = ", too few for that: such intervals hold the truth in 88 to 96 % of cases from 30 to 70 %" if dialogues < 100 else ""
    near = []
    for name, row in results.items():
        rarer = min(min(win, 100 - win) for win in row["win"]) / 100 * row["dialogues"]  # wins or losses at any turn
        if name != "base" and rarer < 5:
            near.append(name)
    narrow = f"; too narrow near 0 and 100 %, with fewer than 5 wins or losses: {', '.join(near)}" if near else ""
    cut = ", ".join(f"{name} {row['cut']:.1f}" for name, row in results.items() if row.get("cut"))
    cut = f"; answers cut at the token limit, %: {cut}" if cut else ""
    lost = max(row.get("failed", 0) for row in results.values())
    out = f"; {lost} openings left out, on which a dialogue failed or did not fit" if lost else ""
    return f"win rates are against base, ties half, 95 % bootstrap intervals over {dialogues} dialogues{few}{narrow}{cut}{out}"


def table(results):
    """Win rates and mean rewards for h = 1..H, then what qualifies them."""
    heads = [*turn_heads(results), "average"]
    lines = markdown(["win rate, %", *heads], [[name, *win_cells(row)] for name, row in results.items()])
    rewards = []
    for name, row in results.items():
        rewards.append([name, *(f"{x:.3f}" for x in [*row["reward"], np.mean(row["reward"])])])
    lines += ["", *markdown(["mean reward", *heads], rewards), ""]
    return "\n".join(lines + details(results))


def details(results):
    """The lines that qualify a win rate: at equal length, under swapping, and how far from the reference it was won."""
    heads = ["average over turns", "win rate", "at equal length", "tokens an answer", "flips, %", "unparsable", "unanswered",
             "KL a conversation (k1)", "KL (k3)"]  # fmt: skip
    rows = []
    for name, r in results.items():
        cells = [name, f"{r['avg']:.1f}"]
        cells += [f"{r['avg_controlled']:.1f}", f"{r['length_avg']:.1f}"] if "length" in r else ["-"] * 2
        cells += [f"{r['flip_rate']:.1f}", str(r["unparsable"]), str(r["unanswered"])] if "asked" in r else ["-"] * 3
        cells += [f"{r[k]:.3f} +- {r[k + '_error']:.3f}" for k in ("kl", "kl_k3")] if "kl" in r else ["-"] * 2
        rows.append(cells)
    return markdown(heads, rows)


def methods_table(results):
    """Table 1, or Table 2 where whole dialogues are judged; the paper's numbers in brackets behind ours.

    A row's "paper": its win rates and their average; or its win rate, reward and KL of Table 2."""
    whole = len(next(iter(results.values()))["win"]) == 1
    heads = ["method", *turn_heads(results), *([] if whole else ["average", "weighted"]), "reward", "KL", "P(H), P(h) in %",
             "pairs", "min"]  # fmt: skip
    rows = []
    for name, r in results.items():
        paper = r.get("paper") or ()
        known = [f" ({x:g})" for x in paper[1:]] if whole and paper else ["", ""]
        wins = win_cells(r, paper[:1] * 2)[:1] if whole else [*win_cells(r, paper), f"{r['weighted']:.1f}" if "weighted" in r else "50.0" if name == "base" else "-"]
        kl = f"{r['kl']:.2f}" if "kl" in r else "-"
        shares = ", ".join(" ".join(f"{100 * share:.0f}" for share in r[law]) for law in ("P(H)", "P(h)") if law in r)
        rows.append([name, *wins, f"{np.mean(r['reward']):.3f}{known[0]}", kl + known[1], shares, str(r.get("pairs", "")),
                     str(r.get("minutes", ""))])  # fmt: skip
    return "\n".join(markdown(heads, rows))


def wrapped(text, width):
    """The lines of a text, none of them longer than width; what breaks a line or moves a terminal's cursor does not."""
    shown = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    lines = []
    for line in shown.splitlines():
        lines += textwrap.wrap(line, width) or [""]
    return lines or [""]


def side_by_side(before, after, width=None):
    """Two dialogues from one opening, turn by turn and whole, in two columns of a terminal that is `width` wide."""
    width = width or min(160, shutil.get_terminal_size((120, 24)).columns)
    column = max(20, (width - 14) // 2)  # 11 for the role, a gap of 3 between the columns
    lines = [f"{'':11s}{'before':{column}s}   after"]
    for a, b in zip_longest(before.messages, after.messages, fillvalue={"role": "", "content": ""}):
        both = zip_longest(wrapped(a["content"], column), wrapped(b["content"], column), fillvalue="")
        for n, (left, right) in enumerate(both):
            role = "" if n else a["role"] or b["role"]
            lines.append(f"{role:11s}{left:{column}s}   {right}".rstrip())
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------


def panels(columns, width, height, rows=1):
    """A figure of panels: (figure, the axes of its row), or of each of its rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes[0] if rows == 1 else axes


def save(figure, path):
    import matplotlib.pyplot as plt

    with files.writing(path) as partial:
        figure.savefig(partial, dpi=150, format="png")
    plt.close(figure)


def plot_wins(ax, name, row, colour, line="o-"):
    """A policy's win rate per turn with its band."""
    turns = np.arange(1, len(row["win"]) + 1)
    ax.plot(turns, row["win"], line, color=colour, label=name)
    ax.fill_between(turns, row["low"], row["high"], color=colour, alpha=0.15, lw=0)
    ax.set(xlabel="turn h", ylabel="win rate against base, %", xticks=turns)


def turns_figure(results, path):
    """Figure 1: win rate per turn with its band, and the mean reward behind it."""
    figure, (left, right) = panels(2, 9, 3.4)
    for i, (name, r) in enumerate(results.items()):
        turns = np.arange(1, len(r["win"]) + 1)
        colour = "0.45" if name == "base" else f"C{i - 1}"
        plot_wins(left, name, r, colour)
        right.errorbar(turns, r["reward"], 1.96 * np.array(r["reward_error"]), fmt="o-", color=colour, label=name)
    left.set(title="win rate per turn")
    right.set(xlabel="turn h", ylabel="mean reward", xticks=turns, title="reward of the first h turns")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def seeds_of(row):
    """{seed: win rates per turn}: of several seeds (tests/seeds.py) a difference is over those that both rows have."""
    return row.get("wins") or {0: row["win"]}


def methods_figure(results, curve, path, order):
    """Figure 1 twice, a column for each loss: win rates per turn, and below REFUEL's less each baseline's, as the paper
    draws it. Where there are curves Figure 2 in a column of its own: win rate against steps.

    order: the kinds of data; a method's colour is that of its data, which stands behind the loss in its name. Panels of
    a row share their y-axis. REFUEL is dashed where the other lines have another loss than its own."""
    losses = [loss for loss in ("rebel", "dpo", "rloo") if any(name.startswith(loss) for name in results)]
    columns = len(losses) + bool(curve)
    figure, axes = panels(columns, 4.2 * columns, 6.4, rows=2)
    colours = {kind: f"C{i}" for i, kind in enumerate(order)}
    refuel = results.get("refuel")
    for column, loss in enumerate(losses):
        top, below = axes[0][column], axes[1][column]
        if column:
            top.sharey(axes[0][0])
            below.sharey(axes[1][0])
        for name, r in results.items():
            own = name.startswith("refuel")
            if not own and not name.startswith(loss):
                continue
            colour, dashed = colours[name.split("-", 1)[-1]], own and loss != "rebel"
            label = f"{name} (Eq. 1, for comparison)" if dashed else name
            plot_wins(top, label, r, colour, "o--" if dashed else "o-")
            common = seeds_of(refuel).keys() & seeds_of(r).keys() if refuel and not own else ()
            if common:
                gap_SH = [np.subtract(seeds_of(refuel)[seed], seeds_of(r)[seed]) for seed in common]
                below.plot(np.arange(1, len(r["win"]) + 1), np.mean(gap_SH, axis=0), "o-", color=colour, label=f"refuel - {name}")
        top.axhline(50, color="0.6", lw=0.8)
        below.axhline(0, color="0.6", lw=0.8)
        top.set(title=f"{loss.upper()} and REFUEL")
        below.set(xlabel="turn h", ylabel="REFUEL less baseline, points", xticks=np.arange(1, len(r["win"]) + 1),
                  xlim=top.get_xlim())  # fmt: skip
        for ax in (top, below):
            if ax.get_legend_handles_labels()[0]:  # no row may share a seed with REFUEL
                ax.legend(frameon=False, fontsize=7)
    if curve:
        last = axes[0][-1]
        for name, points in curve.items():
            last.plot(*zip(*points), "o-", ms=3, color=colours[name.split("-", 1)[-1]], label=name)
        last.set(xlabel="steps", ylabel="average win rate, %", title="win rate against steps")
        last.legend(frameon=False, fontsize=7)
        axes[1][-1].axis("off")
    save(figure, path)


# ---------------------------------------------------------------------------------------------------------------
# Dialogues on the terminal (simulator.py --show)
# ---------------------------------------------------------------------------------------------------------------


def both_futures(first, second, h, scores, tokenizer=None):
    """Both futures of one state as text: the prefix s_h, what of each is trained, and their rewards; without a tokenizer
    how many tokens that are, not which."""
    lines = [f"h = {h} of H = {max(first.turns, second.turns)}, prefix of {len(first.reset(h).ids)} tokens"]
    for m in first.conversation()[: len(first.conversation()) - len(first.messages) + 2 * h - 1]:
        lines.append(f"   {m['role']:10s} {m['content']}")
    for name, d, earned in zip(("y ", "y'"), (first, second), scores, strict=True):
        ids = d.answer(h)
        which = f": {tokenizer.convert_ids_to_tokens(ids)}" if tokenizer else ", which are trained"
        lines.append(f"{name} {len(ids)} sampled tokens{which}")
        for m in d.messages[2 * h - 1 :]:
            lines.append(f"   {m['role']:10s} {m['content']}")
        lines.append("   too long for the reward model" if earned is None else f"   reward {earned:.3f}")
        lines[-1] += "  (an answer was cut)" if any(d.truncated) else ""
    return "\n".join(lines)


def show_stored(path, number, read):
    """The first pairs of a pairs.jsonl, or dialogues of an eval/NAME.jsonl, as text; no model and no tokenizer is needed.

    read(row): a dialogue from its line on disk."""
    if not os.path.isfile(path):
        raise files.BadInput(f"--show: no file at {path}")
    shown = 0
    for line, row in enumerate(files.read_sealed(path) if os.path.exists(f"{path}.sha256") else files.read_lines(path), 1):
        try:
            if "dialogues" in row:
                first, second = map(read, row["dialogues"])
                text = both_futures(first, second, row["h"], row["rewards"])
            elif "messages" in row:
                d = read(row)
                text = "\n".join(f"   {m['role']:10s} {m['content']}" for m in d.conversation())
                text += "\n   (an answer was cut)" * any(d.truncated) + f"\n   failed: {d.failed}" * bool(d.failed)
            else:  # the first line of a wave
                continue
        except (KeyError, TypeError, ValueError, IndexError):
            raise files.BadInput(f"--show: {path}, line {line}, is neither a run's pair nor a dialogue") from None
        print(f"{path}, line {line}", text, sep="\n", end="\n\n")
        shown += 1
        if shown == number:
            return
    if not shown:
        raise files.BadInput(f"--show: {path} holds no pairs and no dialogues of a run")
