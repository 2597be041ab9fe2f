"""The theory checks hold and can fail, their building blocks are right, mutants of them are noticed, and the code that
trains obeys them."""
import contextlib
import io
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "theory")]
import check_props  # noqa: E402
import tabular as tb  # noqa: E402

import mutants  # noqa: E402

NAMES = [f"{where}: {statement}" for where, statement, _, _ in check_props.CHECKS]


# ---- Every check holds, and every check can fail --------------------------------------------------------------------

@pytest.mark.parametrize("where, statement, function, negatives", check_props.CHECKS, ids=NAMES)
def test_a_statement_holds_and_fails_without_each_premise(where, statement, function, negatives):
    result = function(np.random.default_rng(0))
    assert result.holds and result.instances > 0
    assert negatives, "a check without a negative shows nothing"
    for broken in negatives:
        turned = function(np.random.default_rng(0), broken)
        assert not turned.holds, broken
        assert abs(turned.worst) > 1e-3, "failing by rounding would show nothing"


def test_a_check_that_fails_or_cannot_fail_makes_the_exit_code_1():
    where, statement, function, negatives = next(r for r in check_props.CHECKS if r[1] == "performance difference")

    def always_broken(rng, broken):
        return function(rng, negatives[0])

    def never_broken(rng, broken):
        return function(rng)
    assert run_main([(where, statement, function, negatives)])[0] == 0
    code, printed = run_main([(where, statement, always_broken, negatives)])
    assert code == 1 and "FAILS" in printed
    code, printed = run_main([(where, statement, never_broken, negatives)])
    assert code == 1 and "DOES NOT FAIL" in printed
    assert max(len(line) for line in printed.splitlines()) <= 120


def run_main(checks):
    """The exit code and the output of check_props.py with only these rows."""
    printed, rows = io.StringIO(), check_props.CHECKS
    check_props.CHECKS = checks
    try:
        with contextlib.redirect_stdout(printed):
            return check_props.main([]), printed.getvalue()
    finally:
        check_props.CHECKS = rows


SAMPLE = ["exact update", "second term, attained", "first term, within 2.02", "one minimiser",
          "its step is eta ln(p/q)", "the proof; mirror descent on A^t"]


@pytest.mark.parametrize("statement", SAMPLE)
def test_mutants_are_noticed_by_their_row(statement, monkeypatch):
    """A part of tests/mutants.py, which takes minutes: here each mutant by the row that it is listed under."""
    for module in (mutants.T, mutants.C):
        monkeypatch.setitem(sys.modules, module, sys.modules[module])   # put back at the end
    for mutant in mutants.MUTANTS[statement]:
        assert mutant[2] in mutants.EQUIVALENT or mutants.notices(statement, *mutants.load(*mutant)), mutant


def test_the_document_has_every_row_with_its_function_and_negatives():
    document = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8").replace("\\|", "|")
    for where, statement, function, negatives in check_props.CHECKS:
        assert f"| {where} | {statement} | `{function.__name__}` | {'; '.join(negatives)} |" in document
    assert f"{len(check_props.CHECKS)} numerical checks" in document


def test_each_mutant_changes_one_place():
    for module, old, new in sum(mutants.MUTANTS.values(), []):
        source = (ROOT / "theory" / f"{module}.py").read_text(encoding="utf-8")
        assert source.count(old) == 1 and old != new, old


def test_a_check_without_a_number_is_an_error():
    with pytest.raises(AssertionError):
        check_props.judge("=", [(0.0, np.nan)], 1e-8)
    with pytest.raises(AssertionError):
        check_props.judge("<=", [(np.nan, 1.0)], 1e-8)
    with pytest.raises(AssertionError):
        check_props.judge("=", ["a note alone"], 1e-8)


@pytest.mark.parametrize("flags", [["--sed", "1", "--x"], ["--seed", "one"], ["--seed", "-1"], ["--figures", __file__]])
def test_bad_flags_get_one_line_and_exit_code_2(flags):
    run = subprocess.run([sys.executable, "theory/check_props.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    assert len(run.stderr.strip().splitlines()) == 1 and flags[-1] in run.stderr


def test_an_equation_fails_on_either_side_and_an_inequality_on_one():
    assert not check_props.judge("=", [(0.0, 1.0)], 1e-8).holds and not check_props.judge("=", [(1.0, 0.0)], 1e-8).holds
    assert check_props.judge("<=", [(0.0, 1.0)], 1e-8).holds
    assert not check_props.judge("<=", [(0.0, 1.0), (1.0, 0.0)], 1e-8).holds


def test_figures_are_two_of_three_plots(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(tb, "shift_gap", lambda *args, **kwargs: 0.0)
    monkeypatch.setattr(tb, "gradient_gaps", lambda *args, **kwargs: np.ones(3000))
    monkeypatch.setattr(tb, "learn", lambda mdp, gain, T, first, learn=tb.learn: learn(mdp, gain, 1, first))
    monkeypatch.setattr(check_props, "sample_errors", lambda *args, **kwargs: np.ones(1))
    check_props.draw_figures(tmp_path, 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["beyond.png", "paper.png"]


# ---- The building blocks, each against another way to the same number -----------------------------------------------

def world(seed=0, H=3, S=2, A=3):
    rng = np.random.default_rng(seed)
    mdp = tb.random_mdp(rng, H, S, A)
    return rng, mdp, tb.random_policy(rng, mdp.shape)


def test_shapes_are_those_the_design_promises():
    rng, mdp, pi = world()
    phi = rng.normal(size=(*mdp.shape, 4))
    assert tb.occupancy(mdp, pi).shape == (3, 2)
    assert tb.q_values(mdp, pi).shape == tb.refuel_step(mdp, pi, 0.5).shape == (3, 2, 3)
    assert tb.pair_difference(np.array([3.0, 1.0]))[0, 1] == 2
    assert isinstance(tb.apc_error(mdp, phi, np.zeros(4), 0.5), float)
    assert isinstance(tb.q_approx_error(mdp, phi, np.zeros(4)), float)


def test_recursions_equal_the_list_of_all_conversations():
    _, mdp, pi = world()
    H, S, A = mdp.shape
    d, q = np.zeros((H, S)), np.zeros(mdp.shape)
    for states, responses in product(product(range(S), repeat=H), product(range(A), repeat=H)):
        steps = [pi[h, states[h], responses[h]] for h in range(H)]
        moves = [mdp.move[h, states[h], responses[h], states[h + 1]] for h in range(H - 1)]
        reward = mdp.reward[states[-1], responses[-1]]
        for h in range(H):
            d[h, states[h]] += mdp.start[states[0]] * np.prod(steps) * np.prod(moves)
            # Given s_h and y_h: the past is summed out by taking only one of the S^h A^h equal copies of it.
            q[h, states[h], responses[h]] += np.prod(steps[h + 1:]) * np.prod(moves[h:]) * reward / (S * A)**h
    np.testing.assert_allclose(tb.occupancy(mdp, pi), d, atol=1e-14)
    np.testing.assert_allclose(tb.q_values(mdp, pi), q, atol=1e-14)
    np.testing.assert_allclose(tb.q_by_listing(mdp, pi), q, atol=1e-14)


def test_pair_law_is_a_law_whose_futures_have_the_right_marginals_when_coupled():
    _, mdp, pi = world()
    independent, coupled = tb.pair_law(mdp, pi), tb.pair_law(mdp, pi, coupling="common random numbers")
    for law in (independent, coupled, tb.pair_law(mdp, pi, coupling="y' saw y's future")):
        assert law.min() >= 0 and abs(law.sum() - 1) < 1e-13
    np.testing.assert_allclose(coupled.sum(-1), independent.sum(-1), atol=1e-14)
    np.testing.assert_allclose(coupled.sum(-2), independent.sum(-2), atol=1e-14)
    assert np.abs(coupled - independent).max() > 1e-3


def test_sampled_pairs_follow_the_law_of_line_3():
    rng, mdp, pi = world(H=3, S=2, A=2)
    mdp = mdp._replace(reward=np.arange(4.0).reshape(2, 2))   # a reward that names its ending
    n, law = 200_000, np.zeros((3, 2, 2, 2, 4, 4))
    h, s, _, y, y2, r, r2 = tb.sample_pairs(rng, mdp, pi, n)
    np.add.at(law, (h, s, y, y2, r.astype(int), r2.astype(int)), 1 / n)
    assert np.abs(law - tb.pair_law(mdp, pi)).max() < 5 * 0.5 / np.sqrt(n)   # 5 standard deviations


def test_regression_on_samples_minimises_eq_1():
    rng, mdp, pi = world(H=2, S=2, A=3)
    pairs = tb.sample_pairs(rng, mdp, pi, 200)
    h, s, _, y, y2, r, r2 = pairs

    def loss(x):
        g = x.reshape(-1, *mdp.shape)
        return ((g[:, h, s, y] - g[:, h, s, y2] - (r - r2))**2).mean(-1)
    found = tb.minimise(loss, np.zeros(pi.size)).reshape(pi.shape)
    np.testing.assert_allclose(tb.reweigh(pi, tb.sampled_gain(pi, *pairs), 0.7),
                               tb.reweigh(pi, found, 0.7), atol=1e-8)


def test_pairs_at_another_prefix_are_drawn_there():
    _, mdp, pi = world(H=2)
    law = tb.pair_law(mdp, pi, coupling="y' at another prefix").sum((-2, -1))
    one = np.einsum("hs,hsa->hsa", tb.occupancy(mdp, pi) / 2, pi)
    np.testing.assert_allclose(law.sum(-1), one, atol=1e-14)
    np.testing.assert_allclose(law, one[..., None] * pi[:, ::-1, None, :], atol=1e-14)   # of two states the other


def test_theorem_1_measures_what_it_says():
    rng, mdp, star = world()
    pis, eta = tb.random_policy(rng, (4, *mdp.shape)), 0.7
    m = tb.theorem1(mdp, pis, eta, 2.0, star)
    eps, cover_s, cover_y, J = [], [], [], []
    for pi, new in zip(pis, pis[1:]):
        eps.append(tb.relative_error(mdp, pi, np.log(new / pi) / eta))
        cover_s.append((tb.occupancy(mdp, star) / tb.occupancy(mdp, pi)).max())
        cover_y.append((star / pi).max())
        J.append(tb.performance(mdp, pi))
    expected = [max(eps), max(cover_s), max(cover_y), True, tb.performance(mdp, star) - sum(J) / 3]
    np.testing.assert_allclose(m[:5], expected, atol=1e-12)
    best = tb.optimal_policy(mdp)   # given by a policy that shuns it, it is not covered
    shuns = (1 - best) / (1 - best).sum(-1, keepdims=True)
    assert not tb.theorem1(mdp, np.stack([shuns, shuns]), eta, 2.0, best).covered


def test_vanilla_gradient_is_the_gradient():
    _, mdp, first = world()
    unit = 1e-30j * np.eye(first.size).reshape(-1, *first.shape)
    step = tb.performance(mdp, tb.softmax(np.log(first) + unit)).imag / 1e-30
    second = tb.softmax(np.log(first) + 0.5 * step.reshape(first.shape))
    best = tb.performance(mdp, tb.optimal_policy(mdp))
    gaps = [best - tb.performance(mdp, pi) for pi in (first, second)]
    np.testing.assert_allclose(tb.gradient_gaps(mdp, 0.5, 2, natural=False, first=first), gaps, atol=1e-12)


def test_worlds_have_laws_in_their_rows_and_random_customers():
    worlds = [tb.shop(3)[0], tb.lock(3), tb.gamble(), tb.answer_or_ask(), tb.narrow_gate(3, 10)[0], world()[1]]
    for mdp in worlds:
        np.testing.assert_allclose(mdp.move.sum(-1), 1, atol=1e-14)
        assert abs(mdp.start.sum() - 1) < 1e-14
    np.testing.assert_allclose(tb.uniform_policy((2, 3, 4)), 1 / 4)
    np.testing.assert_array_equal(tb.shop(3)[0].move[:, 0, 2], [[0, 0.5, 0.5]] * 2)


def test_regression_on_two_prefixes_minimises_the_centred_least_squares():
    rng, mdp, pi = world(H=2, S=2, A=2)
    pairs = tb.sample_pairs(rng, mdp, pi, 100, shared=False)
    h, s, s2, y, y2, r, r2 = pairs

    def loss(x):
        g = tb.advantage(pi, x.reshape(-1, *mdp.shape))
        return ((g[:, h, s, y] - g[:, h, s2, y2] - (r - r2))**2).mean(-1)
    found = tb.advantage(pi, tb.minimise(loss, np.zeros(pi.size)).reshape(pi.shape))
    np.testing.assert_allclose(tb.advantage(pi, tb.sampled_gain(pi, *pairs)), found, atol=1e-8)


def test_prefixes_of_two_conversations_are_independent_and_answered_by_the_policy():
    rng, mdp, pi = world(H=2, S=2, A=2)
    n, law = 200_000, np.zeros((2, 2, 2, 2, 2))
    h, s, s2, y, y2, _, _ = tb.sample_pairs(rng, mdp, pi, n, shared=False)
    np.add.at(law, (h, s, y, s2, y2), 1 / n)
    one = tb.occupancy(mdp, pi)[..., None] * pi
    assert np.abs(law - np.einsum("hsa,htb->hsatb", one, one) / 2).max() < 5 * 0.5 / np.sqrt(n)


def test_a_bounded_reward_is_centred_and_within_the_bound():
    rng, _, _ = world()
    p = tb.random_policy(rng, (20, 4))
    a = tb.bounded(rng.normal(size=(20, 4)), p, 0.3)
    assert np.abs(a).max() <= 0.3 + 1e-15 and np.abs((p * a).sum(-1)).max() < 1e-15


def test_lumped_responses_of_the_gate_change_nothing():
    Y, H = 5, 3
    mdp, pi, star = tb.narrow_gate(H, Y, e=0.1)
    alike = [0, 1, 1, 1, 1]
    full = mdp._replace(move=mdp.move[:, :, alike], reward=mdp.reward[:, alike])
    uniform, star_full = tb.uniform_policy(full.shape), np.zeros(full.shape)
    star_full[..., 0] = 1
    lumped = tb.theorem1(mdp, np.stack([pi, pi]), 1.0, 0.3, star, Y=Y)
    np.testing.assert_allclose(tb.theorem1(full, np.stack([uniform, uniform]), 1.0, 0.3, star_full), lumped, atol=1e-12)


def test_the_optimiser_finds_a_known_minimum():
    found = tb.minimise(lambda x: np.cosh(x[:, 0] - 1) + (x[:, 1] - x[:, 0])**2, np.array([3.0, -3.0]))
    np.testing.assert_allclose(found, [1, 1], atol=1e-9)


def test_optimal_policy_beats_every_deterministic_policy():
    mdp = tb.MDP(np.array([1.0, 0.0]), np.array([[[[0.0, 1.0], [1.0, 0.0]]] * 2]), np.array([[0.0, 0.8], [0.6, 0.3]]))
    values = [tb.performance(mdp, np.eye(2)[np.reshape(choice, (2, 2))]) for choice in product(range(2), repeat=4)]
    assert abs(tb.performance(mdp, tb.optimal_policy(mdp)) - max(values)) < 1e-14


def test_the_two_errors_of_proposition_2_in_floating_point():
    bandit = tb.MDP(np.ones(1), np.zeros((0, 1, 2, 1)), np.ones((1, 2)))
    phi = np.array([[1.0, -1.0], [-1.0, 1.0]]).reshape(1, 1, 2, 2)
    assert tb.apc_error(bandit, phi, np.zeros(2), 0.5) < 1e-28
    assert abs(tb.q_approx_error(bandit, phi, np.zeros(2)) - 1) < 1e-14


def test_shift_gaps_equal_what_is_worked_out_by_hand():
    """The base policy has not asked by turn H with probability (2/3)^(H-1); see the docstring of `shop`."""
    for H in (2, 5):
        silent = (2 / 3)**(H - 1)
        assert abs(tb.shift_gap("LT-MIXED", H, T=200) - (1 - silent * 3 / 4 - (1 - silent) / 3)) < 1e-9
        assert abs(tb.shift_gap("LT-ONLINE", H, T=200) - silent / 4) < 1e-9
        assert abs(tb.shift_gap("MT-MIXED", H, T=200) - 1 / 4) < 1e-9
        assert tb.shift_gap("REFUEL", H, T=200) < 1e-9


# ---- The code that trains -------------------------------------------------------------------------------------------

def every_pair_in_proportion(mdp, pi):
    """Algorithm 1's data set with every pair of finished conversations as often as its probability says: rows
    (h, s, y, y'), (B, 4), and rewards (2, B). All probabilities are multiples of a power of 1/2, so this is exact."""
    law = tb.pair_law(mdp, pi)
    count = law * 2**14
    assert np.array_equal(count, count.round())
    h, s, y, y2, o, o2 = np.repeat(np.argwhere(count > 0), count[count > 0].astype(int), axis=0).T
    return np.stack([h, s, y, y2], 1), mdp.reward.ravel()[np.stack([o, o2])]


@pytest.mark.parametrize("eta", [0.3, 2.0])
def test_refuel_loss_reaches_the_exact_minimiser(eta):
    """Eq. 1 as the trainer computes it, on a tabular softmax policy: its minimiser is pi exp(eta Q) / Z, Eq. 3."""
    import torch

    import refuel
    skew = np.array([1 / 4, 3 / 4])
    move = np.array([[[[1, 3], [3, 1]], [[2, 2], [3, 1]]]]) / 4
    mdp = tb.MDP(np.array([1 / 2, 1 / 2]), move, np.array([[0.1, 0.9], [0.6, 0.2]]))
    pi = np.array([[skew, skew[::-1]], [skew[::-1], skew]])
    rows_B4, reward_2B = every_pair_in_proportion(mdp, pi)
    h, s, y, y2 = torch.tensor(rows_B4).T
    reward_2B, old = torch.tensor(reward_2B), torch.tensor(np.log(pi))
    logits = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], lr=1, max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14,
                                  line_search_fn="strong_wolfe")

    def gather(logp):
        return torch.stack([logp[h, s, y], logp[h, s, y2]])   # (2, B)

    def closure():
        optimizer.zero_grad()
        loss = refuel.refuel_loss(gather(logits.log_softmax(-1)), gather(old), reward_2B, eta)
        loss.backward()
        return loss
    optimizer.step(closure)
    np.testing.assert_allclose(logits.detach().softmax(-1), tb.refuel_step(mdp, pi, eta), atol=1e-5)
    np.testing.assert_allclose(tb.refuel_step(mdp, pi, eta), tb.reweigh(pi, tb.q_by_listing(mdp, pi), eta), atol=1e-14)
    assert np.abs(tb.refuel_step(mdp, pi, eta) - pi).max() > 0.01


def test_refuel_loss_with_the_sign_of_the_reward_turned_does_not():
    """The negative of the test above, through the same loss: swapping the two rewards of a pair turns the update."""
    import torch

    import refuel
    logp_2B, old_2B = torch.tensor([[0.5], [-0.5]]).double(), torch.zeros(2, 1).double()
    reward_2B = torch.tensor([[1.0], [0.0]]).double()
    assert refuel.refuel_loss(logp_2B, old_2B, reward_2B, 1.0).item() == pytest.approx(0.0)
    assert refuel.refuel_loss(logp_2B, old_2B, reward_2B.flip(0), 1.0).item() == pytest.approx(4.0)
