"""Every statement of the paper, computed exactly and shown to fail without its premise.

    python theory/check_props.py [--seed 0] [--figures DIR]

One function per statement; `broken` is empty for the statement itself, or names a premise to remove or a sign to turn
(CHECKS lists them), and then the same code has to report failure. Of the margins printed an `error` must be zero up to
rounding, a `slack` (right side minus left) not negative. Exit code 1 if a statement fails or a negative does not.
"""
import argparse
import sys
import time
from fractions import Fraction
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tabular as tb


class Result(NamedTuple):
    instances: int
    kind: str       # "error" or "slack"
    margin: float   # the worst over all instances
    holds: bool
    note: str = ""


def equal(errors, note="", tolerance=1e-8):
    """Holds if every error is zero up to rounding and the accuracy of the numerical optimiser."""
    assert np.isfinite(errors).all(), "a check without a number has neither held nor failed"
    return Result(len(errors), "error", float(max(errors)), bool(max(errors) <= tolerance), note)


def at_most(left, right, note=""):
    """Holds if every left side is at most its right side, up to rounding."""
    slack = np.subtract(right, left)
    assert np.isfinite(slack).all(), "a check without a number has neither held nor failed"
    return Result(slack.size, "slack", float(slack.min()), bool(slack.min() >= -1e-12), note)


def instances(rng, n, H=2, S=2, A=3):
    """n random triples of an MDP, a policy without zeros and eta."""
    for _ in range(n):
        yield tb.random_mdp(rng, H, S, A), tb.random_policy(rng, (H, S, A)), np.exp(rng.uniform(-1, 1))


# ---- Section 3: the update ------------------------------------------------------------------------------------------

def maximise_eq2(mdp, pi, eta, as_printed=False):
    """The maximiser of Eq. 2 over all policies, by the numerical optimiser and with Q by definition."""
    q, d = tb.q_by_listing(mdp, pi), tb.occupancy(mdp, pi)[..., None] / mdp.shape[0]

    def loss(logp):
        p = np.exp(logp)
        return -(d * ((pi if as_printed else p) * q - p * (logp - np.log(pi)) / eta)).sum((-3, -2, -1))
    return tb.best_policy(loss, mdp.shape)


def check_eq3(rng, broken=""):
    """Eq. 3: "there exists a closed-form solution" to Eq. 2, pi_{t+1} = pi_t exp(eta Q) / Z.

    Slip: Eq. 2 is printed with y_h ~ pi_t in its first term. That term would not depend on pi, and the maximiser would
    be pi_t itself; y_h ~ pi is meant. The negative takes it as printed."""
    return equal([np.abs(maximise_eq2(*i, bool(broken)) - tb.refuel_step(*i)).max() for i in instances(rng, 6)])


def check_eq4_eq5(rng, broken=""):
    """Eq. 4: Q = (ln Z(s) + ln pi_{t+1} / pi_t) / eta; Eq. 5: "taking the difference ... across the paired responses",
    Q(s, y) - Q(s, y') = (ln pi_{t+1}/pi_t (y|s) - ln pi_{t+1}/pi_t (y'|s)) / eta, eliminates Z.

    Slip: section 3.1 writes eta c_h = ln E exp(eta Q) = Z(s_h), "the log-partition function"; it is ln Z(s_h).
    Negatives: Z as printed there, and the constant that section 3.1 says prior work puts in its place; y' answers
    another prefix of the same turn, so that the partition functions do not cancel."""
    errors = []
    for mdp, pi, eta in instances(rng, 6):
        q, log_ratio = tb.q_by_listing(mdp, pi), np.log(maximise_eq2(mdp, pi, eta) / pi)
        Z = (pi * np.exp(eta * q)).sum(-1, keepdims=True)
        term = {"Z for ln Z": Z, "a constant for ln Z": np.log(Z).mean()}.get(broken, np.log(Z))
        gap = log_ratio / eta - q
        other = np.roll(gap, 1, axis=1) if broken == "y' at another prefix" else gap
        errors += [np.abs(term / eta + gap).max(), np.abs(gap[..., :, None] - other[..., None, :]).max()]
    return equal(errors)


def check_eq1(rng, broken=""):
    """Eq. 1 / section 3.1: "solving Equation 1 optimally would imply" pi_{t+1} ∝ pi_t exp(eta Q).

    The expectation runs over every pair of finished conversations; the reference lists futures for Q.
    Negatives: the futures follow another policy than pi_t; the reward has its sign turned."""
    errors = []
    for mdp, pi, eta in instances(rng, 6):
        law = tb.pair_law(mdp, pi, tb.random_policy(rng, pi.shape) if broken == "futures of another policy" else pi)
        regressed = mdp._replace(reward=-mdp.reward) if broken == "sign of the reward" else mdp
        found = tb.best_policy(lambda logp: tb.eq1_loss(regressed, law, logp - np.log(pi), eta), pi.shape)
        errors.append(np.abs(found - tb.reweigh(pi, tb.q_by_listing(mdp, pi), eta)).max())
    return equal(errors)


def check_unbiased(rng, broken=""):
    """Abstract and section 3: "the difference in two conversation-level rewards generated from a shared prefix is an
    unbiased estimate of the difference in Q values", for a random user, by listing every pair of futures.

    What it takes is that either future, given s, y and y', is a roll-out of pi_t. The two need not be independent of
    each other: with common random numbers the estimate stays unbiased, which is checked too. Negatives: y' is drawn
    after seeing the first future, so that y' tells something about r; y' is drawn and rolled out at another prefix."""
    errors = []
    for mdp, pi, _ in instances(rng, 10):
        for law in [tb.pair_law(mdp, pi), tb.pair_law(mdp, pi, common_numbers=True)]:
            law = tb.dependent_law(mdp, pi) if broken == "y' saw y's future" else law
            mean = (law * tb.pair_difference(mdp.reward.ravel())).sum((-2, -1)) / law.sum((-2, -1))   # (H, S, A, A)
            if broken == "y' at another prefix":
                q = tb.q_by_listing(mdp, pi)
                mean = q[..., :, None] - np.roll(q, 1, axis=1)[..., None, :]
            errors.append(np.abs(mean - tb.pair_difference(tb.q_values(mdp, pi))).max())
    return equal(errors)


def check_eq7(rng, broken=""):
    """Eq. 7: "the minimizer of a least squares problem is the conditional mean", so Eq. 7 may replace Eq. 6.

    Over log-linear policies that cannot express Q, where no fit is exact. (Typo in the sentence before: r(s'_{h+1})
    is r(s'_{H+1}).) Negative: y' is drawn after seeing the first future."""
    errors = []
    for mdp, pi, eta in instances(rng, 6):
        law = tb.dependent_law(mdp, pi) if broken else tb.pair_law(mdp, pi)
        phi = rng.normal(size=(*pi.shape, 2))
        losses = [partial(tb.eq1_loss, mdp, law), partial(tb.eq6_loss, law, tb.q_values(mdp, pi))]
        w7, w6 = [tb.minimise(lambda w: loss(np.moveaxis(phi @ w.T, -1, 0), eta), np.zeros(2)) for loss in losses]
        errors.append(np.abs(w7 - w6).max())
    return equal(errors)


# ---- Section 3.2 and appendix A: Theorem 1 and its lemmas -----------------------------------------------------------

def check_lemma1(rng, broken=""):
    """Lemma 1: J(pi') - J(pi) = sum_h E_{s ~ d_h^{pi'}, y ~ pi'} A_h^pi(s, y), with J by listing every conversation.

    Appendix A writes rewards r(s_h, y_h) in every turn; with the reward of section 2 all but the last are zero.
    Negative: states from d^pi, which is covariate shift as an equation."""
    errors = []
    for mdp, pi, _ in instances(rng, 20, H=3):
        new = tb.random_policy(rng, pi.shape)
        J_new, J = [mdp.start @ (p[0] * tb.q_by_listing(mdp, p)[0]).sum(-1) for p in (new, pi)]
        d = tb.occupancy(mdp, pi if broken else new)[..., None]
        errors.append(abs(J_new - J - (d * new * tb.advantage(pi, tb.q_values(mdp, pi))).sum()))
    return equal(errors)


def check_lemma2(rng, broken=""):
    """Lemma 2: E (Delta - Delta_pi)^2 <= eps / 2. With eps the left side of Assumption 1 it is an equality.

    For any pi_{t+1}. Negative: y' copies y half of the time; each is still ~ pi_t, but they are not independent."""
    errors = []
    for mdp, pi, eta in instances(rng, 50, H=3):
        delta = np.log(tb.random_policy(rng, pi.shape) / pi) / eta - tb.q_values(mdp, pi)
        d = tb.occupancy(mdp, pi) / mdp.shape[0]
        pairs = pi[..., :, None] * pi[..., None, :]
        pairs = (pairs + pi[..., None] * np.eye(pi.shape[-1])) / 2 if broken else pairs
        eps = (d[..., None, None] * pairs * tb.pair_difference(delta)**2).sum()
        errors.append(abs((d[..., None] * pi * tb.advantage(pi, delta)**2).sum() - eps / 2))
    return equal(errors)


def check_lemma3(rng, broken="", constant=2.0, eta_scale=1.0):
    """Lemma 3: "Suppose we have |A^t| <= C ... choose eta = sqrt(ln Y / (C^2 T))": sum_t E A^t <= 2 C sqrt(T ln Y).

    Slips: the proof also needs E_{pi_t} A^t = 0, true of the paper's A^t but not in the statement; and it uses
    eta C <= 1 (printed as eta <= 1/A), which fails for T < ln Y. The statement still holds there: the sum is at most
    T C = C sqrt(T) sqrt(T) < C sqrt(T ln Y). Sharper, checked likewise: Hoeffding's lemma for a mean of zero in
    [-C, C] gives ln Z <= eta^2 C^2 / 2 for every eta, half of the proof's eta^2 C^2; then ln Y / eta + eta T C^2 / 2
    is 3/2 C sqrt(T ln Y) at the paper's eta, and sqrt(2) C sqrt(T ln Y), the least, at sqrt(2) times it.
    Random sequences, random ones improved by a search, and ones built to be worst, whose ratio tends to both sharper
    constants as T grows; T below ln Y too. Negatives: A^t not centred under pi_t; |A^t| up to 2 C."""
    ratios, centre, limit = [], broken != "A^t not centred", 2 if broken == "|A^t| up to 2 C" else 1
    for T, A in [(1, 2), (1, 1000), (2, 50), (3, 5), (6, 1000), (8, 2), (20, 4), (4000, 129)]:
        C = np.exp(rng.uniform(-1, 1))
        eta = eta_scale * np.sqrt(np.log(A) / (C**2 * T))
        sums = (tb.worst_sums(T, A, eta, limit * C, centre) if T == 4000 else
                tb.searched_sums(rng, T, A, eta, limit * C, centre))
        ratios += list(sums / (C * np.sqrt(T * np.log(A))))
    return at_most(ratios, np.full(len(ratios), constant), f"worst ratio {max(ratios):.3f} of {constant:.3f}")


REGRESSIONS = {   # name -> a function of (mdp, rng) that gives the regressor: pi -> ln(pi'/pi) / eta
    "exact": lambda mdp, rng: partial(tb.q_values, mdp),
    "log-linear": lambda mdp, rng: partial(tb.log_linear_gain, mdp, rng.normal(size=(*mdp.shape, 1))),
    "sampled": lambda mdp, rng: lambda pi: tb.sampled_gain(mdp.shape, *tb.sample_pairs(rng, mdp, pi, 400)),
    # The same six pairs of pi_1 in every iteration, so that eps stays large.
    "stale": lambda mdp, rng: lambda pi, pairs=tb.sample_pairs(rng, mdp, tb.uniform_policy(mdp.shape), 6):
        tb.sampled_gain(mdp.shape, *pairs),
}


def check_theorem1(rng, broken="", regressions=("exact",)):
    """Theorem 1, appendix A: J(pi*) - J(pi_t) <= 2 C H sqrt(ln Y / T) + H sqrt(C_s C_y eps / 2) for some t.

    The proof shows it for the mean over t; that is checked, with measured eps, C_s and C_y. One t serves all
    comparators, the t of the largest J(pi_t). The main text hides C, ln Y and 1/2 in O(). C bounds |A^t|, which
    depends on eta, which is set by C: see `learn`. Slip: Assumption 2 prints C_s = max d^{pi*} / d^{pi*}, always 1;
    d^{pi*} / d^{pi_t} is meant, and used. eps is 0, or comes from the class, or from the data (REGRESSIONS).
    Negatives: pi_1 is not uniform but shuns the comparator's responses; regression and Assumption 1 are on the
    prefixes of logs (the shop's clerk), where eps is 0, instead of d^{pi_t}; the term with eps is left out."""
    measured = []
    for T, H, name in product((1, 10, 100, 1000), (1, 2, 4, "shop"), regressions):
        mdp, clerk = tb.shop(2) if H == "shop" else (tb.random_mdp(rng, H, 3, 2), tb.uniform_policy((H, 3, 2)))
        best, gain = tb.optimal_policy(mdp), REGRESSIONS[name](mdp, rng)
        logs = tb.occupancy(mdp, clerk) if broken == "offline prefixes" else None
        seen = 1 if logs is None else logs[..., None] > 0
        first = tb.softmax(-20 * best) if broken == "pi_1 not uniform" else tb.uniform_policy(mdp.shape)
        run = tb.learn(mdp, lambda pi: gain(pi) * seen, T, first)
        measured += [tb.theorem1(mdp, *run, star, logs) for star in (tb.random_policy(rng, mdp.shape), best)]
    bounds = [m.regret_term + (broken != "no eps term") * m.eps_term for m in measured]
    i = np.argmin([bound - m.gap for bound, m in zip(bounds, measured)])
    return at_most([m.gap for m in measured], bounds, f"eps up to {max(m.eps for m in measured):.0e}; "
                   f"tightest: gap {measured[i].gap:.3f}, bound {bounds[i]:.3f}")


# ---- Section 3.2 and appendix B: Propositions 1 and 2 ---------------------------------------------------------------

def features(rng, n):
    """n random (mdp, phi, theta, eta); phi of every second one includes an indicator of every state."""
    state = np.broadcast_to(np.eye(4).reshape(2, 2, 1, 4), (2, 2, 3, 4))
    for i, (mdp, _, eta) in enumerate(instances(rng, n, H=2, S=2, A=3)):
        phi = rng.normal(size=(*mdp.shape, 2))
        phi = np.concatenate([phi, state], -1) if i % 2 else phi
        yield mdp, phi, rng.normal(size=phi.shape[-1]), eta


def check_prop1(rng, broken=""):
    """Proposition 1: if the error of Q by w.phi is at most eps, "the APC condition is satisfied with eps_Pi <= eps".

    The left side is minimised as written, and must be what `apc_error` computes. Where phi has an indicator of every
    state both errors are equal and nothing is to spare. Negative: C is held at Z instead of being free."""
    rows = list(features(rng, 20))
    apc = np.array([tb.apc_by_search(*row, partition=bool(broken)) for row in rows])
    assert broken or np.allclose(apc, [tb.apc_error(*row) for row in rows], atol=1e-10), "apc_error is not APC"
    return at_most(apc - 1e-10, [tb.q_approx_error(*row[:3]) for row in rows])   # less the optimiser's own accuracy


def check_prop1_gap(rng, broken=""):
    """Proposition 1 as an identity: the two errors differ by the variance that free intercepts explain.

    Explained variance = squared length of Q along the state indicators after the features are projected out of them.
    Negative: one intercept for all states, where C(s) may depend on s."""
    errors = []
    for mdp, phi, theta, eta in features(rng, 40):
        x, states, q = tb.weighted_design(mdp, phi, tb.softmax(phi @ theta))
        states = states.sum(-1, keepdims=True) if broken else states
        basis, scale, _ = np.linalg.svd(states - x @ np.linalg.pinv(x) @ states, full_matrices=False)
        explained = ((basis[:, scale > 1e-10].T @ q)**2).sum()
        errors.append(abs(tb.q_approx_error(mdp, phi, theta) - tb.apc_error(mdp, phi, theta, eta) - explained))
    return equal(errors)


def check_free_C(rng, broken=""):
    """Section 3.2: "C does not have to be equal to the partition function Z": with C = Z the APC error is larger.

    Strictly, here by more than 1e-9. Negative: features that express every Q. The APC error is 0 there, and only C = Z
    attains it, because pi' sums to one; so C differs from Z only where eps_Pi > 0."""
    rows = list(features(rng, 20))
    if broken:
        rows = [(mdp, np.eye(12).reshape(2, 2, 3, 12), rng.normal(size=12), eta) for mdp, _, _, eta in rows]
    return at_most([tb.apc_error(*row) + 1e-9 for row in rows], [tb.apc_by_search(*row, True) for row in rows])


def check_prop2(rng, broken=""):
    """Proposition 2: a bandit with r(y_0) = r(y_1) = 1, phi(y_0) = [1, -1], phi(y_1) = [-1, 1]: "the APC condition is
    satisfied with eps_Pi = 0 but" the error of Q by w.phi is 1 under the uniform policy. In fractions.

    w.phi is v and -v: the error p (1-v)^2 + (1-p) (1+v)^2 is least at v = 2p - 1, where it is 4 p (1-p), so 1 only at
    p = 1/2 (the proof stops at ">= 1"; w = 0 attains it). APC: r is itself the intercept, for all p. Negatives, as both
    responses' features are needed: phi(y_1) = 0 gives 1/2, phi(y_1) = phi(y_0) gives 0."""
    scale = {"": Fraction(-1), "no features of y_1": Fraction(0), "y_1 has the features of y_0": Fraction(1)}[broken]
    phi, r = (Fraction(1), scale), (Fraction(1), Fraction(1))   # multiples of [1, -1]: only v = w.[1, -1] counts

    def error(p, f, r):
        """min_v E_p (r - v f)^2."""
        ff, fr = (sum(a * x * y for a, x, y in zip(p, f, g)) for g in (f, r))
        return sum(a * (y - (fr / ff if ff else 0) * x)**2 for a, x, y in zip(p, f, r))

    def centred(p, f):   # a free intercept is least squares on what is left after the mean
        return [x - sum(a * z for a, z in zip(p, f)) for x in f]
    policies = [(Fraction(i, 100), 1 - Fraction(i, 100)) for i in range(1, 100)]   # Pi holds every p in (0, 1)
    apc = [error(p, centred(p, phi), centred(p, r)) for p in policies]
    q_error = error((Fraction(1, 2), Fraction(1, 2)), phi, r)
    return equal([float(e) for e in (abs(q_error - 1), *apc)], f"exactly {max(apc)} and {q_error}", tolerance=0)


# ---- Section 3.1: natural policy gradient ---------------------------------------------------------------------------

def check_npg(rng, broken=""):
    """Section 3.1: the "policy update procedure recovers the NPG update with the softmax policy parametrization".

    NPG from its definition: the gradients of J and of ln pi by complex steps, the Fisher matrix summed over the turns
    (with Eq. 1's mean over h the step would be H eta), its pseudo-inverse. Negative: without the Fisher matrix."""
    errors = []
    for mdp, pi, eta in instances(rng, 20, H=3):
        logits, unit = np.log(pi), np.eye(pi.size).reshape(-1, *pi.shape)
        score = (tb.log_softmax(logits + 1e-30j * unit).imag / 1e-30).reshape(pi.size, -1)   # (parameters, h s y)
        fisher = (score * (tb.occupancy(mdp, pi)[..., None] * pi).ravel()) @ score.T
        step = tb.performance(mdp, tb.softmax(logits + 1e-30j * unit)).imag / 1e-30
        step = step if broken else np.linalg.pinv(fisher, rcond=1e-12) @ step
        errors.append(np.abs(tb.softmax(logits + eta * step.reshape(pi.shape)) - tb.refuel_step(mdp, pi, eta)).max())
    return equal(errors)


def check_npg_rate(rng, broken=""):
    """Section 3.1: NPG "converges to the globally optimal policy at the rate of O(1/T), a faster rate compared to that
    of standard policy gradient methods".

    Exact softmax policy gradient is O(1/T) as well (Mei et al., 2020), with a constant that depends on the MDP and can
    be huge; NPG's does not. So what is checked is NPG's own constant, which the negative, vanilla policy gradient
    with the same eta on the same MDPs, exceeds."""
    cases = [(mdp, eta) for mdp, _, eta in instances(rng, 6, H=4, S=3)] + [(tb.lock(4), 1.0), (tb.shop(4)[0], 1.0)]
    return at_most([tb.gradient_gaps(mdp, eta, 1000, natural=not broken) for mdp, eta in cases],
                   [tb.npg_bound(mdp, eta, 1000) for mdp, eta in cases])


# ---- Section 2.1: covariate shift -----------------------------------------------------------------------------------

def check_shift_last_turn(rng, broken=""):
    """Section 2.1: a policy that "has only learned to generate the final response based on the contexts present in the
    offline data" meets others: LT-MIXED's gap grows with H.

    Early turns stay the base policy's, which asks sooner or later; from then on the logs lack its prefixes, and the
    last turn is answered as the base policy does. Negative: the same turn trained on the policy's own prefixes
    (LT-ONLINE), the only difference; there the gap shrinks with H from H = 2 on."""
    gap = np.array([tb.shift_gap("LT-ONLINE" if broken else "LT-MIXED", H, T=200) for H in range(1, 9)])
    return at_most(gap[:-1] + 1e-4, gap[1:], f"gap at H = 1, 2, 8: {gap[0]:.3f}, {gap[1]:.3f}, {gap[7]:.3f}")


def check_shift_mt_mixed(rng, broken=""):
    """Section 4.1: MT-MIXED "optimizes future returns similar to REFUEL, but at the states sampled from the offline
    data": where these do not cover, a gap of 1/4 stays at every H > 1.

    It learns rightly what asking is worth, given what follows: blind selling, never improved because no logged
    customer was asked. So it learns not to ask. Negative: the clerk acts at random in 2 % of turns; the gap closes."""
    gap = [tb.shift_gap("MT-MIXED", H, T=500, clerk_random=0.02 if broken else 0) for H in range(2, 9)]
    return at_most(np.full(7, 1 / 4 - 1e-9), gap, f"gap at H = 2, 8: {gap[0]:.3f}, {gap[-1]:.3f}")


def check_shift_refuel(rng, broken=""):
    """Section 3: "reduces covariate shift by using on-policy datasets": REFUEL's gap goes to zero like `npg_bound`.

    It, too, first learns not to ask, but never quite stops, and where it asks it learns to sell; then asking pays.
    Negative: the same update on offline prefixes."""
    cases = list(product(range(1, 9), (30, 500)))
    gap = [tb.shift_gap("MT-MIXED" if broken else "REFUEL", H, T=T) for H, T in cases]
    bound = [tb.npg_bound(tb.shop(H)[0], 1.0, T)[-1] for H, T in cases]
    return at_most(gap, bound, f"largest gap at T = 30, 500: {max(gap[::2]):.0e}, {max(gap[1::2]):.0e}")


# ---- The table, the figures, the command ----------------------------------------------------------------------------

CHECKS = [   # statement, function, its negatives
    ("Eq. 3 solves Eq. 2", check_eq3, ["Eq. 2 as printed"]),
    ("Eq. 4 and 5: Q from log-ratios", check_eq4_eq5, ["Z for ln Z", "a constant for ln Z", "y' at another prefix"]),
    ("Eq. 1 is minimised by pi exp(eta Q) / Z", check_eq1, ["futures of another policy", "sign of the reward"]),
    ("r - r' is unbiased for the difference of Q", check_unbiased, ["y' saw y's future", "y' at another prefix"]),
    ("Eq. 7 has Eq. 6's minimiser", check_eq7, ["y' saw y's future"]),
    ("Lemma 1: performance difference", check_lemma1, ["states of the old policy"]),
    ("Lemma 2: half of eps, with equality", check_lemma2, ["y' sometimes copies y"]),
    ("Lemma 3: 2 C sqrt(T ln Y)", check_lemma3, ["A^t not centred", "|A^t| up to 2 C"]),
    ("Lemma 3, Hoeffding: 3/2 C sqrt(T ln Y)", partial(check_lemma3, constant=1.5), ["|A^t| up to 2 C"]),
    ("Lemma 3, Hoeffding, its eta: sqrt(2)", partial(check_lemma3, constant=2**.5, eta_scale=2**.5),
     ["|A^t| up to 2 C"]),
    ("Theorem 1, exact update", check_theorem1, ["pi_1 not uniform", "offline prefixes"]),
    ("Theorem 1, log-linear policies", partial(check_theorem1, regressions=["log-linear"]), ["no eps term"]),
    ("Theorem 1, sampled pairs", partial(check_theorem1, regressions=["sampled", "stale"]), ["no eps term"]),
    ("Proposition 1: APC error <= error of Q", check_prop1, ["C held at Z"]),
    ("Proposition 1: intercepts explain the gap", check_prop1_gap, ["one intercept"]),
    ("APC: the best C is not Z", check_free_C, ["complete features"]),
    ("Proposition 2: 0 and 1", check_prop2, ["no features of y_1", "y_1 has the features of y_0"]),
    ("NPG is REFUEL's exact update", check_npg, ["vanilla gradient"]),
    ("NPG's O(1/T)", check_npg_rate, ["vanilla gradient"]),
    ("Shift: LT-MIXED's gap grows with H", check_shift_last_turn, ["own prefixes"]),
    ("Shift: MT-MIXED keeps a gap", check_shift_mt_mixed, ["logs that cover"]),
    ("Shift: REFUEL's gap goes to 0", check_shift_refuel, ["offline prefixes"]),
]


def run_check(statement, function, negatives, seed):
    """Prints the line of a check and its negatives, on the same instances; true if all came out as they must."""
    began = time.time()
    result, *turned = [function(np.random.default_rng(seed), broken) for broken in ("", *negatives)]
    verdict, note = "holds" if result.holds else "FAILS", f" | {result.note}" if result.note else ""
    without = ", ".join(f"{name} {'DOES NOT FAIL' if r.holds else 'fails as it must'} ({r.margin:.0e})"
                        for name, r in zip(negatives, turned))
    print(f"{statement:<43}{result.instances:>5} {result.kind} {result.margin:7.1e} {verdict}"
          f"{time.time() - began:5.1f} s  negatives: {without}{note}", flush=True)
    return result.holds and not any(r.holds for r in turned)


def draw_figures(folder, seed):
    """Three plots: Theorem 1's bound and gap against T, NPG and vanilla gradient against T, the shift against H."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")

    def save(name, x, y, title):
        plt.xlabel(x), plt.ylabel(y), plt.title(title, fontsize=10), plt.legend(fontsize=8), plt.grid(alpha=0.3)
        plt.tight_layout(), plt.savefig(folder / name, dpi=150), plt.close()

    rng, Ts = np.random.default_rng(seed), [1, 3, 10, 30, 100, 300, 1000, 3000]
    mdp, pi_1 = tb.random_mdp(rng, 2, 3, 2), tb.uniform_policy((2, 3, 2))
    for i, name in enumerate(["exact", "log-linear", "sampled"]):
        gain = REGRESSIONS[name](mdp, rng)
        rows = [tb.theorem1(mdp, *tb.learn(mdp, gain, T, pi_1), tb.optimal_policy(mdp)) for T in Ts]
        plt.loglog(Ts, [m.gap for m in rows], f"C{i}{'os*'[i]}-", label=f"{name}: mean gap")
        plt.loglog(Ts, [m.regret_term + m.eps_term for m in rows], f"C{i}--", label=f"{name}: bound")
    save("theorem1.png", "T", "J(pi*) - J(pi_t)", "Theorem 1: the bound and the gap (H = 2, Y = 2)")

    for i, H in enumerate((3, 5)):
        mdp, T = tb.lock(H), np.arange(1, 3001)
        plt.loglog(T, tb.gradient_gaps(mdp, 1.0, 3000), f"C{i}-", label=f"NPG = REFUEL, H = {H}")
        plt.loglog(T, tb.gradient_gaps(mdp, 1.0, 3000, natural=False), f"C{i}--", label=f"vanilla gradient, H = {H}")
        plt.loglog(T, tb.npg_bound(mdp, 1.0, 3000), f"C{i}:", label=f"NPG's O(1/T) bound, H = {H}")
    plt.ylim(1e-4, 30)
    save("npg.png", "T", "J(pi*) - J(pi_T)", "Natural and vanilla policy gradient, eta = 1, one right response a turn")

    for name in tb.METHODS:
        plt.plot(range(1, 11), [tb.shift_gap(name, H, T=200) for H in range(1, 11)], "o-", label=name)
    save("shift.png", "H", "J(pi*) - J(pi)", "Covariate shift: exact regressions on different prefixes and turns")


def main(argv=None):
    parser = argparse.ArgumentParser(prog="check_props.py", description="Check every statement of the paper exactly.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw the three plots into this folder")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if args.figures:
        try:
            args.figures.mkdir(parents=True, exist_ok=True)
            draw_figures(args.figures, args.seed)
        except (OSError, ImportError) as error:
            parser.error(f"--figures {args.figures}: {error}")
    print("statement, instances tried, worst margin, holds or not, seconds, negatives (their margin) | note")
    good = [run_check(*check, args.seed) for check in CHECKS]
    print(f"{sum(good)} of {len(good)} statements hold, and fail without their premises")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
