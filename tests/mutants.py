"""Mutation test of theory/: each line below breaks one line of tabular.py or check_props.py, and a check must notice.

    python tests/mutants.py [PART]     # PART of a mutant's text picks some

A mutant is noticed if the row of check_props.py under which it is listed fails, if one of that row's negatives does
not, or if a test of the building blocks in tests/test_theory.py fails. docs/theory.md holds the last result. Exit code
1 if one survives that is not in EQUIVALENT, or if one of those is noticed after all.
"""
import contextlib
import io
import sys
import time
import types
import warnings
from pathlib import Path

import numpy as np

from usage import arguments

THEORY = Path(__file__).resolve().parent.parent / "theory"
T, C = "tabular", "check_props"

MUTANTS = {   # the row or test that should notice: module, what stands there, what the mutant has
    "minimised by pi exp(eta Q) / Z": [
        (T, "0.9 * rng.dirichlet(np.full(S, 0.3), size=(H - 1, S, A)) + 0.1 / S",
         "0.9 * rng.dirichlet(np.full(S, 0.3), size=(H - 1, S, A)) + 0.2 / S"),
        (T, "[..., None, None] / eta - future", "[..., None, None] * eta - future"),
        (T, "x - step if better else x", "x + step if better else x"),
        (T, "np.abs(g).max() < 1e-14", "np.abs(g).max() < 1e-2"),
    ],
    "pi exp(eta Q) / Z solves Eq. 2": [
        (T, "return x - np.log(np.exp(x).sum(-1, keepdims=True))",
         "return x - np.log(np.exp(x).mean(-1, keepdims=True))"),
        (T, "if h == H - 1:\n            law", "if h >= H - 2:\n            law"),
        (T, "* pi[h + 1, s2, y2], h + 1", "* pi[h, s2, y2], h + 1"),
        (T, "pi[..., h + 1, :, :] * q[0]", "pi[..., h, :, :] * q[0]"),
        (T, "weight = pi * np.exp(eta * (gain", "weight = np.exp(eta * (gain"),
        (T, "np.exp(eta * (gain - gain.max(-1, keepdims=True)))",
         "np.exp(-eta * (gain - gain.max(-1, keepdims=True)))"),
        (T, "return reweigh(pi, q_values(mdp, pi), eta)", "return reweigh(pi, q_values(mdp, pi), eta / mdp.shape[0])"),
        (C, "(pi if as_printed else p) * q", "p * q"),
    ],
    "closure gives APC 0; eta = infinity": [
        (T, "np.exp(eta * (gain - gain.max(-1, keepdims=True)))", "np.exp(eta * (gain - gain.max()))"),
    ],
    "exact update": [
        (T, "q_values(mdp, pi)[h].argmax(-1)]", "q_values(mdp, pi)[h].argmin(-1)]"),
        (C, "m.regret_term + (broken", "0 * m.regret_term + (broken"),
    ],
    "performance difference": [
        (T, "rewards[h] + np.inner", "np.inner"),
        (T, "joint = d[-1][..., None] * pi[..., h, :, :]", "joint = d[-1][..., None] * pi[..., h + 1, :, :]"),
        (T, "mdp.rewards[H - 1])", "mdp.rewards[-1])"),
        (C, "holds = bool(slack[i] >= -tolerance)", "holds = True"),
    ],
    "the proof; mirror descent on A^t": [
        (T, "return (mdp.start * (pi * q", "return (1 / len(mdp.start) * (pi * q"),
        (C, "delta = tb.advantage(pi, log_ratio / eta - q)", "delta = log_ratio / eta - q"),
        (C, "split = (d * star * A).sum() - (d", "split = (d * star * A).sum() + (d"),
        (C, "+ eta * (star * A).sum(-1) - log_Z", "+ (star * A).sum(-1) - log_Z"),
        (C, "(d * star * (A + np.abs(delta))).sum()", "(d * star * (A - np.abs(delta))).sum()"),
    ],
    "one minimiser": [
        (T, "return f - (pi * f).sum", "return f - (f / f.shape[-1]).sum"),
        (T, "pair_difference(log_ratio) / eta - pair_difference(q))**2",
         "pair_difference(log_ratio) - pair_difference(q))**2"),
        (T, "mass = np.sqrt(occupancy(mdp, pi)[..., None] * pi)", "mass = np.ones_like(pi)"),
        (T, "return phi @ np.linalg.lstsq", "return -phi @ np.linalg.lstsq"),
        (T, "y = mass * advantage(pi, q_values(mdp, pi))", "y = mass * q_values(mdp, pi)"),
    ],
    "r - r' is unbiased for Q - Q'": [
        (T, "np.roll(law, 1, axis=1), np.roll(pi, 1, axis=1)", "law, np.roll(pi, 1, axis=1)"),
        (T, "joint = law[y] * law2[y2]", "joint = law[y] * law[y2]"),
        (T, "np.where((ending < ending.mean())[:, None], uniform, joint)",
         "np.where((ending < 0)[:, None], uniform, joint)"),
    ],
    "test_pairs_at_another_prefix_are_drawn_there": [
        (T, "occupancy(mdp, pi) / mdp.shape[0], pi, pi2)", "occupancy(mdp, pi) / mdp.shape[0], pi, pi)"),
    ],
    "test_pair_law_is_a_law_whose_futures_have_the_right_marginals_when_coupled": [
        (T, "occupancy(mdp, pi) / mdp.shape[0], pi, pi2)", "occupancy(mdp, pi), pi, pi2)"),
        (T, "np.minimum(upper[y], upper[y2]) - np.maximum", "np.minimum(upper[y], upper[y2]) - np.minimum"),
    ],
    "test_sampled_pairs_follow_the_law_of_line_3": [
        (T, "s = np.where(g < h, draw", "s = np.where(g <= h, draw"),
        (T, "on = g >= h", "on = g > h"),
        (T, "y, s = np.where(on, draw(pi, g + 1, s2), y)", "y, s = np.where(on, draw(pi, g, s2), y)"),
    ],
    "n eps tends to trace(G^+ M)": [
        (T, "rollout(s2, y2)) for", "rollout(s, y2)) for"),
        (T, "for _ in range(rollouts)]", "for _ in range(1)]"),
        (T, "rcond=1e-10, hermitian", "rcond=0.5, hermitian"),
        (T, "np.ones((A, A))) * pi.reshape(H, 1, S * A)", "np.ones((A, A))) / A"),
        (T, "pair_difference(gain - q_values(mdp, pi))**2", "pair_difference(gain + q_values(mdp, pi))**2"),
        (T, "(occupancy(mdp, pi) / mdp.shape[0])[..., None, None]", "occupancy(mdp, pi)[..., None, None]"),
        (T, "(noise[:, None] + noise) / rollouts", "noise / rollouts"),
        (T, "(noise[:, None] + noise) / rollouts", "(noise[:, None] + noise) / rollouts**2"),
        (T, "+ pair_difference(q - centre @ q)**2", "+ 0"),
        (T, "pair * np.kron(np.diag(1 / d[h])", "pair * np.kron(np.diag(0 * d[h] + 1)"),
    ],
    "test_prefixes_of_two_conversations_are_independent_and_answered_by_the_policy": [
        (T, "s2 = s if shared else prefix()", "s2 = s"),
        (T, "y2 = draw(pi, h, s), draw(pi, h, s2)", "y2 = draw(pi, h, s), draw(pi, h, s)"),
    ],
    "test_regression_on_two_prefixes_minimises_the_centred_least_squares": [
        (T, "gram = centre.transpose(0, 2, 1) @ gram @ centre", "gram = gram + 0"),
    ],
    "test_regression_on_samples_minimises_eq_1": [
        (T, "rewards(a) - rewards(b)", "rewards(a) + rewards(b)"),
        (T, "- pairs(a, b) - pairs(b, a)", "- pairs(a, b)"),
    ],
    "2 C sqrt(T ln Y)": [
        (T, "softmax(eta * (total - total.max", "softmax(-eta * (total - total.max"),
        (T, "return total.max(-1)", "return total.mean(-1)"),
        (T, "a = a - (p * a).sum(-1, keepdims=True) if centre else a", "a = a"),
        (T, "C, -C)[:, None]", "-C, C)[:, None]"),
        (T, "np.where(t < wait, waiting, sprint)", "np.where(t < wait, sprint, waiting)"),
        (T, "np.linspace(0.5, 3, 11)", "np.linspace(8, 9, 11)"),
        (C, "[(0.95 * constant, worst)]", "[(1.05 * constant, worst)]"),
    ],
    "first term, within 2.02": [
        (T, "eta = np.sqrt(np.log(Y or mdp.shape[-1]) / (C**2 * T))", "eta = np.sqrt(np.log(Y or mdp.shape[-1]) / T)"),
        (T, "eta = np.sqrt(np.log(Y or mdp.shape[-1]) / (C**2 * T))",
         "eta = 0.3 * np.sqrt(np.log(Y or mdp.shape[-1]) / (C**2 * T))"),
        (T, "if measured <= C + 1e-12:", "if True:"),
        (T, "advantage(np.stack(pis[:-1]), np.stack(gains))).max()",
         "advantage(np.stack(pis[:-1]), np.stack(gains))).min()"),
        (T, "C = 1.1 * measured", "C = 5 * measured"),
        (T, "(log[1:] - log[:-1]) / eta - q)**2", "(log[1:] - log[:-1]) - q)**2"),
        (T, "2 * C * H * np.sqrt(np.log(Y or A) / T)", "2 * C * np.sqrt(np.log(Y or A) / T)"),
        (T, "2 * C * H * np.sqrt(np.log(Y or A) / T)", "2 * H * np.sqrt(np.log(Y or A) / T)"),
        (T, "2 * C * H * np.sqrt(np.log(Y or A) / T)", "2 * C * H * np.sqrt(1 / T)"),
        (T, "2 * C * H * np.sqrt(np.log(Y or A) / T)", "2 * C * H * np.log(Y or A) / T"),
        (T, "2 * C * H * np.sqrt(np.log(Y or A) / T)", "3 * C * H * np.sqrt(np.log(Y or A) / T)"),
    ],
    "second term, attained": [
        (T, "(log[1:] - log[:-1]) / eta - q)**2", "(log[1:] - log[:-1]) / eta)**2"),
        (T, ".sum((-2, -1)).max() / H", ".sum((-2, -1)).max()"),
        (T, "    C_s = np.divide(star, d, ", "    C_s = np.divide(star, star, "),
        (T, "    C_s = np.divide(star, d, ", "    C_s = np.divide(d, d, "),
        (T, "    C_y = np.divide(comparator, pi, ", "    C_y = np.divide(pi, pi, "),
        (T, "H * np.sqrt(C_s * C_y * eps / 2)", "np.sqrt(C_s * C_y * eps / 2)"),
        (T, "H * np.sqrt(C_s * C_y * eps / 2)", "H * np.sqrt(C_y * eps / 2)"),
        (T, "H * np.sqrt(C_s * C_y * eps / 2)", "H * np.sqrt(C_s * eps / 2)"),
        (T, "H * np.sqrt(C_s * C_y * eps / 2)", "H * np.sqrt(C_s * C_y * eps / 8)"),
        (T, "H * np.sqrt(C_s * C_y * eps / 2)", "H * np.sqrt(C_s * C_y * eps)"),
        (T, "H * np.sqrt(C_s * C_y * eps / 2)", "H * (C_s * C_y * eps / 2)"),
        (T, "H * np.sqrt(C_s * C_y * eps / 2)", "np.sqrt(H * C_s * C_y * eps / 2)"),
        (T, "move[1:, 0, 0] = (1 - e) * eye[0] + e * eye[2]", "move[1:, 0, 0] = eye[0]"),
    ],
    "test_theorem_1_measures_what_it_says": [
        (T, "covered = not ((star > 0) & (d == 0)).any() and", "covered = True or"),
        (T, ".sum((-2, -1)).max() / H", ".sum((-2, -1)).mean() / H"),
        (T, "performance(mdp, comparator) - performance(mdp, pi).mean()",
         "performance(mdp, comparator) - performance(mdp, pi).max()"),
        (T, "performance(mdp, comparator) - performance(mdp, pi).mean()",
         "performance(mdp, comparator) - performance(mdp, pi[-1])"),
    ],
    "APC error <= error of Q": [
        (T, "occupancy(mdp, pi)[..., None] * pi / mdp.shape[0]\n    log_Z",
         "occupancy(mdp, pi)[..., None] * pi\n    log_Z"),
        (T, "eta * q + log_C[..., None]) / eta)**2", "eta * q + log_C[..., None]))**2"),
        (T, "eta * q + log_C[..., None]) / eta)**2", "q + log_C[..., None]) / eta)**2"),
        (T, "np.hstack([x / eta, states]), q)\n", "x / eta, q)\n"),
        (T, "root = np.sqrt(occupancy(mdp, pi)[..., None] * pi / H)",
         "root = np.sqrt(occupancy(mdp, pi)[..., None] * pi)"),
        (T, "return log_N + (pi * (eta", "return -log_N + (pi * (eta"),
        (T, "eta * q_values(mdp, pi) - phi @ w)", "q_values(mdp, pi) - phi @ w)"),
    ],
    "NPG linear, vanilla gradient c / T": [
        (T, "reweigh(pi, gain if natural else", "reweigh(pi, gain / 2 if natural else"),
    ],
    "test_vanilla_gradient_is_the_gradient": [
        (T, "occupancy(mdp, pi)[..., None] * pi * gain, eta)", "pi * gain, eta)"),
    ],
    "NPG's O(1/T), attained to 2 %": [
        (T, "(np.log(mdp.shape[-1]) / eta + mdp.reward.max())", "np.log(mdp.shape[-1]) / eta"),
        (T, "(np.log(mdp.shape[-1]) / eta + mdp.reward.max())", "mdp.reward.max()"),
        (T, "(np.log(mdp.shape[-1]) / eta + mdp.reward.max())", "(np.log(mdp.shape[-1]) / eta + 2 * mdp.reward.max())"),
        (T, "return mdp.shape[0] * (np.log", "return (np.log"),
    ],
    "test_worlds_have_laws_in_their_rows_and_random_customers": [
        (T, "np.full(shape, 1 / shape[-1])", "np.full(shape, 1 / shape[-2])"),
        (T, "move[:, 0, 2, 1:] = 1 / 2", "move[:, 0, 2, 1:] = [1, 0]"),
    ],
    "LT-MIXED's gap grows with H": [
        (T, "seen[:-1] &= not last_only", "seen[:-1] &= True"),
    ],
    "MT-MIXED keeps a gap of 1/4": [
        (T, "(1 - clerk_random) * clerk + clerk_random * uniform", "clerk + 0 * uniform"),
    ],
    "H ~ U(K), h ~ U(H): sum_H J_H / H": [
        (T, "K * allowed.sum(1, keepdims=True)", "K * allowed.sum(0, keepdims=True)"),
        (T, "(draw / draw.sum(0))[H - 1", "draw[H - 1"),
    ],
    "soft optimum on conversations": [
        (T, "np.exp(eta * q)).sum(-1)) / eta\n", "np.exp(eta * q)).sum(-1))\n"),
        (T, "* (s[:, :1] == s[:, 0])", "* 1.0"),
    ],
    "its step is eta ln(p/q)": [
        (T, "+ noise * higher.swapaxes", "+ noise * higher + 0 * higher.swapaxes"),
        (T, "pair_difference(r) > 0, law)", "pair_difference(r) >= 0, law)"),
        (T, "np.log(np.where(p > 0, p, 1.0)) - np.log", "np.log(np.where(p > 0, p, 1.0)) + np.log"),
    ],
    "the gamble: REFUEL's gap is 0": [
        (T, "move[0, :, 1] = [0, 0.6, 0.4]", "move[0, :, 1] = [0, 0.9, 0.1]"),
    ],
    "test_an_equation_fails_on_either_side_and_an_inequality_on_one": [
        (C, "slack = -np.abs(right - left)", "slack = right - left"),
        (C, "slack[i] >= -tolerance", "slack[i] >= -np.inf"),
        (C, "else right - left\n", "else left - right\n"),
        (C, "i = slack.argmin()", "i = slack.argmax()"),
    ],
    "half of eps, with equality": [
        (C, "delta)**2).sum(), eps / 2", "delta)**2).sum(), eps"),
    ],
    "3/2, sqrt(2) C sqrt(T ln Y), attained": [
        (T, "+ eta * C**2 / 2\n", "- eta * C**2 / 2\n"),
        (C, "1 / scale + scale / 2", "1 / scale + scale / 3"),
        (C, "1 / scale + scale / 2", "1 / scale + scale"),
    ],
    "0 and 1": [
        (C, "error(p, tb.advantage(p, phi), tb.advantage(p, r))", "error(p, phi, r)"),
        (C, "ff = (p * f**2).sum()", "ff = (f**2).sum()"),
    ],
    "NPG is REFUEL's exact update": [
        (C, "fisher = (score * (tb.occupancy(mdp, pi)[..., None] * pi)",
         "fisher = (score * (tb.occupancy(mdp, pi)[..., None] + 0 * pi)"),
    ],
    "test_a_check_that_fails_or_cannot_fail_makes_the_exit_code_1": [
        (C, "return result.holds and not any(r.holds for r in turned)", "return result.holds"),
        (C, "return result.holds and not any(r.holds for r in turned)", "return not any(r.holds for r in turned)"),
        (C, "return 0 if all(good) else 1", "return 0"),
    ],
    "test_optimal_policy_beats_every_deterministic_policy": [
        (T, "for h in reversed(range(mdp.shape[0])):\n        pi[h] = np.eye",
         "for h in range(mdp.shape[0]):\n        pi[h] = np.eye"),
    ],
    "test_shapes_are_those_the_design_promises": [
        (T, "return f[..., :, None] - f[..., None, :]", "return f[..., None, :] - f[..., :, None]"),
    ],
    "test_a_bounded_reward_is_centred_and_within_the_bound": [
        (T, "np.minimum(1, C / np.abs(a)", "np.minimum(1, 2 * C / np.abs(a)"),
    ],
}

EQUIVALENT = {   # the mutant's text: why nothing can notice
    "pair * np.kron(np.diag(0 * d[h] + 1)": "with a shared prefix a state's weight cancels between G^+ and M",
    "y = mass * q_values(mdp, pi)": "the mean of Q under pi is orthogonal to features centred under pi",
}


def load(module, old, new):
    """The two modules with one text replaced, as fresh modules under their own names."""
    for name in (T, C):
        source = (THEORY / f"{name}.py").read_text(encoding="utf-8")
        if name == module and old != new:
            assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {name}.py"
            source = source.replace(old, new)
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__file__ = str(THEORY / f"{name}.py")
        exec(compile(source, f"{name}.py", "exec"), sys.modules[name].__dict__)
    return sys.modules[T], sys.modules[C]


def building_blocks(tb, checks):
    """The tests of test_theory.py that take no fixture and no parameter, on these modules, by name."""
    import test_theory
    test_theory.tb, test_theory.check_props = tb, checks
    tests = {}
    for name, function in vars(test_theory).items():
        if name.startswith("test_") and not function.__code__.co_argcount and not hasattr(function, "pytestmark"):
            tests[name] = function
    return tests


def notices(where, tb, checks):
    """Whether a row (by its statement) or a test (by its name) fails; a crash is a failure."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            for row in checks.CHECKS:
                if row[1] == where:   # the statement first: where it fails, the negatives need not run
                    return not checks.run_check(*row[:3], [], 0) or not checks.run_check(*row, 0)
            building_blocks(tb, checks)[where]()
    except Exception:
        return True
    return False


def noticed_by(first, module, old, new):
    """The first of the row that it is listed under and the building blocks' tests that notices the mutant, or None."""
    tb, checks = load(module, old, new)
    for where in [first, *building_blocks(tb, checks)]:
        if notices(where, tb, checks):
            return where
    return None


def main(part=""):
    began, wrong, count = time.time(), 0, 0
    tb, checks = load(T, "", "")
    for where in [*MUTANTS, *building_blocks(tb, checks)] if not part else []:
        assert not notices(where, tb, checks), f"{where} fails without any mutant"
    for first, mutants in MUTANTS.items():
        for module, old, new in mutants:
            if part not in new:
                continue
            count += 1
            where = noticed_by(first, module, old, new)
            wrong += (where is None) != (new in EQUIVALENT)
            verdict = where or ("equivalent" if new in EQUIVALENT else "SURVIVES")
            print(f"{count:>4} {new.strip()[:70]!r:<74} {'' if where == first else '* '}{verdict}", flush=True)
    print(f"{count} mutants, {len(EQUIVALENT)} equivalent, {wrong} not as expected, {time.time() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.path[:0] = [str(THEORY), str(THEORY.parent), str(Path(__file__).parent)]
    sys.exit(main(*arguments(__doc__, part=dict(nargs="?", default=""))))
