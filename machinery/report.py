"""What a person sees at the end: tables in Markdown, figures, two dialogues side by side.

A row of results is evaluate.py's, {name: {"win": [h = 1..H], "low", "high", "avg", ...}}; whole dialogues have one column.
"""
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


def win_cells(row, paper=()):
    """Win rate and interval of each turn and of their average, the paper's number in brackets behind it if there is one."""
    values = [*zip(row["win"], row["low"], row["high"]), (row["avg"], row["avg_low"], row["avg_high"])]
    cells = []
    for i, (win, low, high) in enumerate(values):
        cells.append(f"{win:.1f} [{low:.1f}, {high:.1f}]" + (f" ({paper[i]:.1f})" if paper else ""))
    return cells


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
        cells += [f"{r['avg_controlled']:.1f}", f"{np.mean(r['length']):.1f}"] if "length" in r else ["-"] * 2
        cells += [f"{r['flip_rate']:.1f}", str(r["unparsable"]), str(r["unanswered"])] if "asked" in r else ["-"] * 3
        cells += [f"{r[k]:.3f} +- {r[k + '_error']:.3f}" for k in ("kl", "kl_k3")] if "kl" in r else ["-"] * 2
        rows.append(cells)
    return markdown(heads, rows)


def methods_table(results):
    """Table 1, the paper's numbers in brackets behind ours."""
    heads = ["method", *turn_heads(results), "average", "weighted", "reward", "KL", "pairs", "min"]
    rows = []
    for name, r in results.items():
        weighted, reward, kl = r.get("weighted", r["avg"]), np.mean(r["reward"]), r.get("kl", 0)
        rows.append([name, *win_cells(r, r.get("paper")), f"{weighted:.1f}", f"{reward:.3f}", f"{kl:.2f}",
                     str(r.get("pairs", "")), str(r.get("minutes", ""))])  # fmt: skip
    return "\n".join(markdown(heads, rows))


def side_by_side(before, after, width=58):
    """Two dialogues from one opening, turn by turn."""
    lines = [f"{'before':{width + 12}s}after"]
    for a, b in zip(before.messages, after.messages):
        lines.append(f"{a['role']:10s}  {a['content'][:width]:{width}s}{b['content'][:width]}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------------------------


def panels(number, width, height):
    """A figure of `number` panels in a row: (figure, axes)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, number, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, axes[0]


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


def methods_figure(results, curve, path, order):
    """Figure 1, one panel a loss, and, where there are curves, Figure 2 (win rate against steps).

    order: the kinds of data; a method's colour is that of its data, which stands behind the loss in its name."""
    losses = [loss for loss in ("rebel", "dpo", "rloo") if any(name.startswith(loss) for name in results)]
    width = 4.2 * (len(losses) + bool(curve))
    figure, axes = panels(len(losses) + bool(curve), width, 3.6)
    colours = {kind: f"C{i}" for i, kind in enumerate(order)}
    for ax, loss in zip(axes, losses):
        for name, r in results.items():
            if name == "refuel" or name.startswith(loss):
                dashed = name == "refuel" and loss != "rebel"
                plot_wins(ax, name, r, colours[name.split("-", 1)[-1]], "o--" if dashed else "o-")
        ax.axhline(50, color="0.6", lw=0.8)
        ax.set(title=f"{loss.upper()} and REFUEL")
        ax.legend(frameon=False, fontsize=7)
    for name, points in curve.items():
        axes[-1].plot(*zip(*points), "o-", ms=3, color=colours[name.split("-", 1)[-1]], label=name)
    if curve:
        axes[-1].set(xlabel="steps", ylabel="average win rate, %", title="win rate against steps")
        axes[-1].legend(frameon=False, fontsize=7)
    save(figure, path)
