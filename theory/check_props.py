"""Numerical checks of the paper's statements in MDPs small enough for exact values: evidence, not proof.

    python theory/check_props.py [--seed 0] [--figures DIR]

One function per statement; `broken` is empty, or names a premise to remove or a factor to drop (CHECKS lists them), and
then the same code has to report failure. A row shows both sides where they are worst. Exit code 1 if a statement fails
or a negative does not. docs/theory.md explains the rows.
"""
import argparse
import sys
import time
from fractions import Fraction
from functools import partial, wraps
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tabular as tb


class Result(NamedTuple):
    instances: int
    left: float     # both sides, where they are worst
    sign: str       # "=" or "<="
    right: float
    worst: float    # |left - right| for "=", right - left for "<="
    holds: bool
    note: str = ""


def judge(sign, found, tolerance):
    """Holds if left = right, or left <= right, up to the tolerance, in every pair found; texts among them are notes."""
    columns, notes = [np.zeros((2, 0))], []
    for item in found:
        if isinstance(item, str):
            notes.append(item)
        else:
            columns.append(np.reshape(np.broadcast_arrays(*item), (2, -1)).astype(float))
    left, right = np.concatenate(columns, axis=1)
    assert len(left) and np.isfinite([left, right]).all(), "a check without a number has neither held nor failed"
    slack = -np.abs(right - left) if sign == "=" else right - left
    i = slack.argmin()
    worst = abs(slack[i]) if sign == "=" else slack[i]
    holds = bool(slack[i] >= -tolerance)
    return Result(len(columns) - 1, left[i], sign, right[i], worst, holds, ", ".join(notes))


def equal(check, sign="=", tolerance=1e-8, **settings):
    """The check, which yields its pairs, as a function of rng and broken that judges them; 1e-8 is the optimiser's."""
    @wraps(check)
    def judged(rng, broken=""):
        return judge(sign, check(rng, broken, **settings), tolerance)
    return judged


at_most = partial(equal, sign="<=", tolerance=1e-12)


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
    """Eq. 3: "there exists a closed-form solution" to Eq. 2, pi_{t+1} = pi_t exp(eta Q) / Z."""
    for mdp, pi, eta in instances(rng, 6):
        yield maximise_eq2(mdp, pi, eta, as_printed=bool(broken)), tb.refuel_step(mdp, pi, eta)


def check_eq4_eq5(rng, broken=""):
    """Eq. 4: Q = (ln Z(s) + ln pi_{t+1} / pi_t) / eta. Eq. 5: its "difference ... across the paired responses"."""
    for mdp, pi, eta in instances(rng, 6):
        q, log_ratio = tb.q_by_listing(mdp, pi), np.log(maximise_eq2(mdp, pi, eta) / pi)
        Z = (pi * np.exp(eta * q)).sum(-1, keepdims=True)
        term = {"Z for ln Z": Z, "a constant for ln Z": np.log(Z).mean()}.get(broken, np.log(Z))
        shift = int(broken == "y' at another prefix")
        yield q, (term + log_ratio) / eta
        q2, log_ratio2 = np.roll(q, shift, axis=1), np.roll(log_ratio, shift, axis=1)
        yield q[..., :, None] - q2[..., None, :], (log_ratio[..., :, None] - log_ratio2[..., None, :]) / eta


def check_eq1(rng, broken=""):
    """Eq. 1 / section 3.1: "solving Equation 1 optimally would imply" pi_{t+1} ∝ pi_t exp(eta Q)."""
    for mdp, pi, eta in instances(rng, 6):
        law = tb.pair_law(mdp, pi, tb.random_policy(rng, pi.shape) if broken == "futures of another policy" else pi)
        regressed = mdp._replace(reward=-mdp.reward) if broken == "reward's sign turned" else mdp
        found = tb.best_policy(lambda logp: tb.eq1_loss(regressed, law, logp - np.log(pi), eta), pi.shape)
        yield found, tb.reweigh(pi, tb.q_by_listing(mdp, pi), eta)


def check_unbiased(rng, broken=""):
    """Section 3: the difference of two rewards "is an unbiased estimate of the difference in Q values"."""
    for mdp, pi, _ in instances(rng, 10):
        for coupling in [broken] if broken else ["", "common random numbers"]:
            law = tb.pair_law(mdp, pi, coupling=coupling)
            mean = (law * tb.pair_difference(mdp.reward.ravel())).sum((-2, -1)) / law.sum((-2, -1))   # (H, S, A, A)
            yield mean, tb.pair_difference(tb.q_values(mdp, pi))


def check_eq7(rng, broken=""):
    """Eq. 7, "the conditional mean", may replace Eq. 6: over log-linear policies that cannot express Q, too."""
    for mdp, pi, eta in instances(rng, 6):
        law = tb.pair_law(mdp, pi, coupling=broken)
        phi = rng.normal(size=(*pi.shape, 2))
        losses = [partial(tb.eq1_loss, mdp, law), partial(tb.eq6_loss, law, tb.q_values(mdp, pi))]
        w7, w6 = [tb.minimise(lambda w: loss(np.moveaxis(phi @ w.T, -1, 0), eta), np.zeros(2)) for loss in losses]
        yield from [(w7, w6), (phi @ w7, eta * tb.log_linear_gain(mdp, phi, pi))]


# ---- Section 3.2 and appendix A: Theorem 1 and its lemmas -----------------------------------------------------------

def check_lemma1(rng, broken=""):
    """Lemma 1: J(pi') - J(pi) = sum_h E_{s ~ d_h^{pi'}, y ~ pi'} A_h^pi(s, y), with a reward in every turn."""
    for mdp, pi, _ in instances(rng, 20, H=3):
        mdp, new = mdp._replace(reward=rng.uniform(size=pi.shape)), tb.random_policy(rng, pi.shape)
        difference = 0.0
        for (p, sign), H in product([(new, 1), (pi, -1)], (1, 2, 3)):   # r(s_h, y_h) ends conversations of h turns
            q = tb.q_by_listing(tb.ending_at(mdp, H), p[:H])
            difference += sign * mdp.start @ (p[0] * q[0]).sum(-1)
        d = tb.occupancy(mdp, pi if broken == "states of the old policy" else new)[..., None]
        q = tb.q_values(tb.ending_at(mdp, 3) if broken == "the last reward alone" else mdp, pi)
        yield difference, (d * new * tb.advantage(pi, q)).sum()


def check_lemma2(rng, broken=""):
    """Lemma 2: E (Delta - Delta_pi)^2 <= eps / 2. With eps the left side of Assumption 1 it is an equality."""
    for mdp, pi, eta in instances(rng, 50, H=3):
        delta = np.log(tb.random_policy(rng, pi.shape) / pi) / eta - tb.q_values(mdp, pi)
        d = tb.occupancy(mdp, pi) / mdp.shape[0]
        pairs = pi[..., :, None] * pi[..., None, :]
        pairs = (pairs + pi[..., None] * np.eye(pi.shape[-1])) / 2 if broken else pairs
        eps = (d[..., None, None] * pairs * tb.pair_difference(delta)**2).sum()
        yield (d[..., None] * pi * tb.advantage(pi, delta)**2).sum(), eps / 2


def check_proof(rng, broken=""):
    """Appendix A: REFUEL is "policy mirror descent w.r.t. the reward function A^t", A^t = A^{pi_t} + Delta^t centred;
    Eq. 8 sums Lemma 1, Eq. 9 splits it into A^t and Delta, Eq. 10 is the step of KL(pi*|pi_t)."""
    for mdp, star, eta in instances(rng, 10, H=3):
        pis = tb.random_policy(rng, (4, *mdp.shape))
        pi, new = pis[:-1], pis[1:]
        q, log_ratio = tb.q_values(mdp, pi), np.log(new / pi)
        delta = tb.advantage(pi, log_ratio / eta - q)
        A = tb.advantage(pi, q) + delta * (broken != "mirror descent: no Delta")
        d = tb.occupancy(mdp, pi if broken == "Eq. 8: states of pi_t" else star)[..., None]
        gap = (tb.performance(mdp, star) - tb.performance(mdp, pi)).sum()
        split = (d * star * A).sum() - (d * star * delta).sum() * (broken != "Eq. 9: no Delta")
        short = np.minimum((d * star * (A + np.abs(delta))).sum() - gap, 0)  # Eq. 9's bound, with |Delta|
        log_Z = np.log((pi * np.exp(eta * A)).sum(-1)) * (broken != "Eq. 10: no ln Z")
        kl = (star * np.log(star / pis)).sum(-1)
        yield from [(new, tb.reweigh(pi, A, eta)), (gap, (d * star * tb.advantage(pi, q)).sum()), (gap, split)]
        yield from [((pi * A).sum(-1), 0), (short, 0), (-kl[1:], -kl[:-1] + eta * (star * A).sum(-1) - log_Z)]


def check_lemma3(rng, broken="", sharp=False):
    """Lemma 3: "Suppose we have |A^t| <= C ... choose eta = sqrt(ln Y / (C^2 T))": sum_t E A^t <= 2 C sqrt(T ln Y).
    Sharp: 3/2 C sqrt(T ln Y), and sqrt(2) at sqrt(2) eta; `worst_sums` comes within 5 % of both (Hoeffding's lemma)."""
    centre, limit = broken != "A^t not centred", 2 if broken == "|A^t| up to 2 C" else 1
    for scale in (1, 2**.5) if sharp else (1,):
        ratios, constant = [], 1 / scale + scale / 2
        for T, A in [(1, 2), (1, 1000), (2, 50), (3, 5), (6, 1000), (8, 2), (20, 4), (4000, 129)]:
            C = np.exp(rng.uniform(-1, 1))
            sums = tb.worst_sums(T, A, scale * np.sqrt(np.log(A) / (C**2 * T)), limit * C, centre)
            ratios.append(sums / (C * np.sqrt(T * np.log(A))))
        worst = max(r.max() for r in ratios)
        bound = (0.94 if broken == "6 % less" else 1) * constant if sharp else 2
        yield from [(r, bound) for r in ratios] + [(0.95 * constant, worst)]
        yield f"worst ratio {worst:.3f} at {scale:.2f} eta"


def regressor(name, mdp, rng):
    """The regressor pi -> ln(pi'/pi) / eta of Theorem 1: exact, of a class that is too small, or from samples."""
    if name == "exact":
        return partial(tb.q_values, mdp)
    if name == "log-linear":
        return partial(tb.log_linear_gain, mdp, rng.normal(size=(*mdp.shape, 1)))
    # Stale: the same six pairs of pi_1 in every iteration, so that eps stays large.
    stale = tb.sample_pairs(rng, mdp, tb.uniform_policy(mdp.shape), 6) if name == "stale" else None
    return lambda pi: tb.sampled_gain(pi, *(stale or tb.sample_pairs(rng, mdp, pi, 400)))


def check_theorem1(rng, broken="", regressions=("exact",)):
    """Theorem 1: the mean of J(pi*) - J(pi_t) <= 2 C H sqrt(ln Y / T) + H sqrt(C_s C_y eps / 2), all measured."""
    measured = []
    for T, H, name in product((1, 10, 100, 1000), (1, 2, 4, "shop"), regressions):
        mdp, clerk = tb.shop(2) if H == "shop" else (tb.random_mdp(rng, H, 3, 2), tb.uniform_policy((H, 3, 2)))
        best, gain = tb.optimal_policy(mdp), regressor(name, mdp, rng)
        logs = tb.occupancy(mdp, clerk) if broken == "offline prefixes" else None
        seen = 1 if logs is None else logs[..., None] > 0
        shunned = (1 - best) / (1 - best).sum(-1, keepdims=True)
        firsts = {"pi_1 not uniform": tb.softmax(-20 * best), "comparator not covered": shunned}
        run = tb.learn(mdp, lambda pi: gain(pi) * seen, T, firsts.get(broken, tb.uniform_policy(mdp.shape)))
        measured += [tb.theorem1(mdp, *run, star, logs) for star in (tb.random_policy(rng, mdp.shape), best)]
    assert all(m.covered for m in measured) or broken in ("offline prefixes", "comparator not covered")
    for m in measured:
        yield m.gap, m.regret_term + (broken != "no eps term") * m.eps_term
    yield f"eps up to {max(m.eps for m in measured):.0e}"


def check_first_term(rng, broken=""):
    """Theorem 1 with eps = 0: its first term, 2 C H sqrt(ln Y / T), is within a factor of 2.02 of the gap in `lock`.
    There pi* is learned from the last turn on. Y = 1000, the wrong ones lumped; the reward is 4, so that C is not 1."""
    H, T, Y = 4, 1600, 1000
    mdp = tb.lock(H, 2)
    mdp = mdp._replace(reward=4 * mdp.reward)
    first = np.full(mdp.shape, [1 / Y, 1 - 1 / Y])
    pis, eta, C = tb.learn(mdp, partial(tb.q_values, mdp), T, first, Y)
    m = tb.theorem1(mdp, pis, eta, C, tb.optimal_policy(mdp), Y=Y)
    factor = {"no H": H, "no C": C, "no ln Y": np.sqrt(np.log(Y)), "no root": np.sqrt(T / np.log(Y))}.get(broken, 1)
    assert m.eps < 1e-20
    yield from [(m.gap, m.regret_term / factor), (m.regret_term / 2.02, m.gap), (C, 1.2 * 4), f"C = {C:.2f}"]


def check_second_term(rng, broken="", logs=False):
    """Theorem 1's second term H sqrt(C_s C_y eps / 2), attained up to sqrt((H-1)/H): `narrow_gate`, where pi_t stays.
    With logs: section 3.2, "additional offline distribution": half of the prefixes are logs mu that cover, and
    (d^{pi_t} + mu) / 2 stands for d^{pi_t} in both assumptions."""
    for H in (2, 4, 8, 16):
        mdp, pi, star = tb.narrow_gate(H, 1000)
        d = tb.occupancy(mdp, star)
        mixed = (tb.occupancy(mdp, pi) + d) / 2 if logs else None
        m = tb.theorem1(mdp, np.stack([pi, pi]), 1.0, 0.0, star, mixed)
        assert m.covered and m.regret_term == 0
        printed = np.divide(d, d, out=np.zeros_like(d), where=d > 0).max()
        own = tb.theorem1(mdp, np.stack([pi, pi]), 1.0, 0.0, star).eps
        factor = {"no H": H, "sqrt(H) for H": H**.5, "no C_s": m.C_s**.5, "no C_y": m.C_y**.5, "eps / 4": 2**.5,
                  "no root": H / m.eps_term, "C_s as printed": (m.C_s / printed)**.5,
                  "eps without the logs": (m.eps / own)**.5}.get(broken, 1)
        yield from [(m.gap, m.eps_term / factor), (0.98 * np.sqrt((H - 1) / H) * m.eps_term, m.gap)]
        if H == 8:
            yield f"gap over bound at H = 8: {m.gap / m.eps_term:.3f}"


# ---- Section 3.2 and appendix B: the APC condition ------------------------------------------------------------------

def features(rng, n):
    """n random (mdp, phi, theta, eta); phi of every second one includes an indicator of every state."""
    state = np.broadcast_to(np.eye(4).reshape(2, 2, 1, 4), (2, 2, 3, 4))
    for i, (mdp, _, eta) in enumerate(instances(rng, n)):
        phi = rng.normal(size=(*mdp.shape, 2))
        phi = np.concatenate([phi, state], -1) if i % 2 else phi
        yield mdp, phi, rng.normal(size=phi.shape[-1]), eta


def complete(rng, rows):
    """The same rows with features that express every function of (s, y)."""
    return [(mdp, np.eye(12).reshape(2, 2, 3, 12), rng.normal(size=12), eta) for mdp, _, _, eta in rows]


def check_closure(rng, broken=""):
    """Section 3.2: closure under soft improvement "implies the above condition", eps_Pi = 0, here for all policies.
    Footnote 1: a hard improvement "corresponds to eta = infinity"."""
    rows = list(features(rng, 20))
    for mdp, phi, theta, eta in rows if broken == "class not closed" else complete(rng, rows):
        pi = tb.softmax(phi @ theta)
        q, large = tb.q_values(mdp, pi), 1.0 if broken == "eta = 1" else 1e9
        hard = (q == q.max(-1, keepdims=True)).astype(float)
        yield from [(tb.apc_error(mdp, phi, theta, eta), 0), (tb.refuel_step(mdp, pi, large), hard)]


def check_free_C(rng, broken=""):
    """Section 3.2: "C does not have to be equal to the partition function Z"; it has for complete features."""
    rows = list(features(rng, 20))
    gaps = []
    for mdp, phi, theta, eta in complete(rng, rows) if broken else rows:
        pi = tb.softmax(phi @ theta)
        log_Z = np.log((pi * np.exp(eta * tb.q_values(mdp, pi))).sum(-1))
        gaps.append(np.abs(tb.best_log_C(mdp, phi, theta, eta) - log_Z).max())
    yield 1e-2, max(gaps)


def check_prop1(rng, broken=""):
    """Proposition 1: if the error of Q by w.phi is at most eps, "the APC condition is satisfied with eps_Pi <= eps"."""
    for row in features(rng, 20):
        apc, log_C = tb.apc_by_search(*row, partition=bool(broken))
        yield apc - 1e-10, tb.q_approx_error(*row[:3])   # less the optimiser's own accuracy
        if not broken:
            yield abs(apc - tb.apc_error(*row)), 1e-10
            yield np.abs(log_C - tb.best_log_C(*row)), 1e-5


def check_prop1_gap(rng, broken=""):
    """Proposition 1 as an identity: the errors differ by what state indicators explain beyond the features."""
    for mdp, phi, theta, eta in features(rng, 40):
        x, states, q = tb.weighted_design(mdp, phi, tb.softmax(phi @ theta))
        states = states.sum(-1, keepdims=True) if broken else states
        basis, scale, _ = np.linalg.svd(states - x @ np.linalg.pinv(x) @ states, full_matrices=False)
        explained = ((basis[:, scale > 1e-10].T @ q)**2).sum()
        yield tb.q_approx_error(mdp, phi, theta) - tb.apc_error(mdp, phi, theta, eta), explained


def check_prop2(rng, broken=""):
    """Proposition 2: a bandit with r = (1, 1), phi = [1, -1] and [-1, 1]: "the APC condition is satisfied with
    eps_Pi = 0 but" the error of Q by w.phi is 1 under the uniform policy. In fractions; with r = (3/2, 1/2) too."""
    one, half = Fraction(1), Fraction(1, 2)
    scale = {"no features of y_1": 0, "APC, y_1 as y_0": 1}.get(broken, -1)
    phi = np.array([one, scale * one])   # multiples of [1, -1]: only v = w.[1, -1] counts

    def error(p, f, r):
        """min_v E_p (r - v f)^2."""
        ff = (p * f**2).sum()
        v = (p * f * r).sum() / ff if ff else 0
        return (p * (r - v * f)**2).sum()
    for r in np.array([[one, one], [3 * half, half]]):
        if broken != "APC, y_1 as y_0":
            yield error(np.array([half, half]), phi, r), 1
        for i in range(1, 100):   # Pi holds every p in (0, 1); a free intercept takes the means
            p = np.array([Fraction(i, 100), Fraction(100 - i, 100)])
            yield error(p, tb.advantage(p, phi), tb.advantage(p, r)), 0


# ---- Sections 3.1 and 2.1: natural policy gradient, covariate shift -------------------------------------------------

def check_npg(rng, broken=""):
    """Section 3.1: the "policy update procedure recovers the NPG update" F^+ grad J, both by complex steps."""
    for mdp, pi, eta in instances(rng, 20, H=3):
        logits, unit = np.log(pi), np.eye(pi.size).reshape(-1, *pi.shape)
        score = (tb.log_softmax(logits + 1e-30j * unit).imag / 1e-30).reshape(pi.size, -1)   # (parameters, h s y)
        fisher = (score * (tb.occupancy(mdp, pi)[..., None] * pi).ravel()) @ score.T
        step = tb.performance(mdp, tb.softmax(logits + 1e-30j * unit)).imag / 1e-30
        step = step if broken else np.linalg.pinv(fisher, rcond=1e-12) @ step
        yield tb.softmax(logits + eta * step.reshape(pi.shape)), tb.refuel_step(mdp, pi, eta)


def check_npg_rate(rng, broken=""):
    """Section 3.1: NPG converges "at the rate of O(1/T)": T times the mean gap is below `npg_bound`, and near it."""
    cases = [(mdp, eta) for mdp, _, eta in instances(rng, 6, H=4, S=3)] + [(tb.lock(4), 1.0), (tb.shop(4)[0], 1.0)]
    for mdp, eta in cases + [(tb.lock(4), 0.02)]:
        H, _, A = mdp.shape
        less = {"no ln Y": H * np.log(A) / eta, "no max r": H * mdp.reward.max()}.get(broken, 0)
        regret = tb.gradient_gaps(mdp, eta, 1500, natural=broken != "vanilla gradient").cumsum()
        bound = tb.npg_bound(mdp, eta) - less
        yield regret, bound
    attained = regret[-1] / bound                              # in the lock, with the small eta
    yield from [(0.98, attained), f"lock: {attained:.3f} of the bound"]


def check_npg_linear(rng, broken=""):
    """Section 3.1: "a faster rate compared to that of standard policy gradient methods": with fixed eta exp(-eta D T),
    D the best response's lead, against c / T, in bandits. Each rate relative to that, within 5 %."""
    for _ in range(3):
        mdp = tb.MDP(np.ones(1), np.zeros((0, 1, 3, 1)), np.sort(rng.uniform(size=(1, 3))) + [[0, 0.2, 0.5]])
        D = mdp.reward[0, 2] - mdp.reward[0, 1]
        gap = tb.gradient_gaps(mdp, 20 / (200 * D), 200, natural=broken != "NPG: vanilla gradient")
        slow = tb.gradient_gaps(mdp, 4.0, 4000, natural=broken == "vanilla gradient: NPG") + 1e-300
        yield from [(np.log(gap[99] / gap[199]) / 10, 1), (slow[1999] / slow[3999] / 2, 1)]   # eta D 100 = 10


def check_shift_last_turn(rng, broken=""):
    """Section 2.1: a policy that "has only learned to generate the final response": LT-MIXED's gap grows."""
    gap = np.array([tb.shift_gap("LT-ONLINE" if broken else "LT-MIXED", H, T=100) for H in range(1, 9)])
    yield gap[:-1] + 1e-4, gap[1:]


def check_shift_mt_mixed(rng, broken=""):
    """Section 4.1: MT-MIXED learns at states "from the offline data", none after asking, where it sells blindly."""
    for H in range(2, 9):
        yield tb.shift_gap("MT-MIXED", H, T=500, clerk_random=0.02 if broken else 0), 1 / 4


def check_shift_refuel(rng, broken=""):
    """Section 3: "on-policy datasets" reduce the shift: REFUEL learns to sell where it asks, then to ask; gap -> 0."""
    for H, T in product(range(1, 9), (30, 500)):
        gap = tb.shift_gap("MT-MIXED" if broken else "REFUEL", H, T=T)
        yield gap, tb.npg_bound(tb.shop(H)[0], 1.0) / T


# ---- Beyond the paper -----------------------------------------------------------------------------------------------

def check_length_law(rng, broken=""):
    """At pi_t the gradient of Eq. 1 is -4/eta that of sum_H P(H, h) J_H (P is the same for all h <= H), and the
    minimiser is pi exp(eta sum_H P(H | h) Q_{h,H}) / Z."""
    for mdp, pi, eta in instances(rng, 2, H=3, S=2, A=2):
        K = mdp.shape[0]
        mdp = mdp._replace(reward=rng.uniform(size=mdp.shape))
        new = np.log(pi) + 1e-30j * np.eye(pi.size).reshape(-1, *pi.shape)
        for uniform in (False, True):
            draw, claimed = tb.length_draw(K, uniform), tb.length_draw(K, uniform != bool(broken))
            laws, J = [], 0
            for H in range(1, K + 1):
                end, weight = tb.ending_at(mdp, H), (H * draw[H - 1, :H]).reshape(H, 1, 1, 1, 1, 1)
                laws.append((end, weight * tb.pair_law(end, pi[:H])))   # `pair_law` draws h with 1/H
                J = J + claimed[H - 1, 0] * tb.performance(end, tb.softmax(new)[..., :H, :, :])

            def loss(logp):
                return sum(tb.eq1_loss(m, law, (logp - np.log(pi))[..., :m.shape[0], :, :], eta) for m, law in laws)
            yield loss(tb.log_softmax(new)).imag / 1e-30, -4 / eta * J.imag / 1e-30
            yield tb.best_policy(loss, pi.shape), tb.length_step(mdp, pi, claimed, eta)


RULES = {   # what decides in which MDP: the MDP, the number of lengths that its value sums, the exact update
    "H ~ U(K), h ~ U(H)": (tb.answer_or_ask(), 2, partial(tb.length_step, draw=tb.length_draw(2), eta=1.0)),
    "uniform over h <= H": (tb.answer_or_ask(), 2, partial(tb.length_step, draw=tb.length_draw(2, True), eta=1.0)),
    "DPO on REFUEL's pairs": (tb.gamble(), 1, partial(tb.dpo_step, eta=1.0, noise=1e-3)),
    "REFUEL on REFUEL's pairs": (tb.gamble(), 1, partial(tb.refuel_step, eta=10.0))}


def rule_gaps(rule, T):
    """Gap of the mean over lengths after exact updates by a rule, (T,)."""
    mdp, lengths, step = RULES[rule]
    return tb.update_gaps(mdp, partial(step, mdp), T) / lengths


def check_rule(rng, broken="", right="", wrong=""):
    """The right rule's gap goes to 0: uniform over h <= H learns to ask, REFUEL not to gamble. DPO on the same pairs
    counts how often the gamble wins (.6) and not what it earns (.36 against .5)."""
    yield rule_gaps(wrong if broken else right, 400)[-1], 1e-6


def check_dpo_user(rng, broken=""):
    """DPO's analysis "is based on deterministic transition": then DPO on conversations gives the soft optimum."""
    for mdp, ref, eta in instances(rng, 4):
        if not broken:
            mdp = mdp._replace(move=np.eye(2)[rng.integers(2, size=(1, 2, 3))])
        seen = tb.occupancy(mdp, ref)[..., None] > 0
        yield tb.conversation_dpo(mdp, ref, eta) * seen, tb.soft_optimum(mdp, ref, eta) * seen


def check_dpo_step(rng, broken=""):
    """DPO on REFUEL's pairs is `dpo_step`; 5 % of the labels are turned around, so that the minimiser is finite."""
    for mdp, pi, eta in instances(rng, 4, A=2):
        law = tb.pair_law(mdp, pi)
        higher = tb.pair_difference(mdp.reward.ravel()) > 0
        first, second = [(law * h).sum((-2, -1)) for h in (higher, higher.T)]

        def loss(logp):
            margin = tb.pair_difference(logp - np.log(pi)) / eta
            chosen, rejected = np.log(1 + np.exp(-margin)), np.log(1 + np.exp(margin))
            p, q = 0.95 * first + 0.05 * second, 0.05 * first + 0.95 * second
            return (p * chosen + q * rejected).sum((-4, -3, -2, -1))
        step = tb.refuel_step(mdp, pi, eta) if broken == "REFUEL's step" else tb.dpo_step(
            mdp, pi, eta, 0 if broken else 0.05)
        yield tb.best_policy(loss, pi.shape), step


def check_dpo_order(rng, broken=""):
    """If the rewards after y and y' are ordered as laws (first-order dominance), ln(p/q) has the sign of Q - Q'."""
    for _ in range(200):
        better, other = rng.dirichlet(np.ones(4), size=2)
        if not broken:   # the larger of two distribution functions is the lower law
            other = np.diff(np.maximum(better.cumsum(), other.cumsum()), prepend=0)
        move = np.array([better, other])[None, None].repeat(4, axis=1)
        mdp = tb.MDP(np.full(4, 1 / 4), move, np.sort(rng.uniform(size=4))[:, None].repeat(2, axis=1))
        pi = tb.uniform_policy(mdp.shape)
        moved = np.log(tb.dpo_step(mdp, pi, 1.0, 0.01) / pi)[0, 0]
        q = tb.q_values(mdp, pi)[0, 0]
        yield 0, (moved[0] - moved[1]) * (q[0] - q[1])


def sample_world():
    """Two turns with prefixes of different value, and the uniform policy."""
    mdp = tb.random_mdp(np.random.default_rng(3), 2, 3, 3)
    return mdp._replace(reward=0.5 * mdp.reward + 0.5 * np.array([[0], [0.5], [1]])), tb.uniform_policy((2, 3, 3))


def sample_errors(rng, mdp, pi, n, repeats, **kwargs):
    """The left side of Assumption 1 after the regression on n pairs, (repeats,); a repeat is H turns of one big fit."""
    H = mdp.shape[0]
    h, *rest = tb.sample_pairs(rng, mdp, pi, n * repeats, **kwargs)
    gain = tb.sampled_gain(np.tile(pi, (repeats, 1, 1)), h + H * (np.arange(n * repeats) % repeats), *rest)
    return tb.relative_error(mdp, pi, gain.reshape(repeats, *pi.shape))


def check_samples(rng, broken=""):
    """Assumption 1's eps falls like 1/n in the pairs: n eps tends to `sampling_limit`."""
    mdp, pi = sample_world()
    limits = []
    for rollouts, shared in ((1, True), (4, True), (1, False)):
        counted = tb.sampling_limit(mdp, pi, 1 if broken == "four roll-outs as one" else rollouts,
                                    shared or broken == "prefix as if shared")
        eps = [sample_errors(rng, mdp, pi, n, 250, rollouts=rollouts, shared=shared).mean() for n in (400, 3200)]
        slope = np.log(eps[1] / eps[0]) / np.log(8)
        yield from [(400 * eps[0] / counted, 1), (3200 * eps[1] / counted, 1), (slope, -1)]
        limits.append(f"{counted:.3f} (slope {slope:.2f})")
    yield f"n eps tends to {', '.join(limits)}"


# ---- The table, the figures, the command ----------------------------------------------------------------------------

CHECKS = [   # where in the paper ("+": beyond it), statement, function, its negatives
    ("Eq. 2, 3", "pi exp(eta Q) / Z solves Eq. 2", equal(check_eq3), ["Eq. 2 as printed"]),
    ("Eq. 4, 5", "Q from log-ratios", equal(check_eq4_eq5),
     ["Z for ln Z", "a constant for ln Z", "y' at another prefix"]),
    ("Eq. 1", "minimised by pi exp(eta Q) / Z", equal(check_eq1),
     ["futures of another policy", "reward's sign turned"]),
    ("Section 3", "r - r' is unbiased for Q - Q'", equal(check_unbiased),
     ["y' saw y's future", "y' at another prefix"]),
    ("Eq. 6, 7", "one minimiser", equal(check_eq7), ["y' saw y's future"]),
    ("Lemma 1", "performance difference", equal(check_lemma1), ["states of the old policy", "the last reward alone"]),
    ("Lemma 2", "half of eps, with equality", equal(check_lemma2), ["y' sometimes copies y"]),
    ("Eq. 8 to 10", "the proof; mirror descent on A^t", equal(check_proof),
     ["mirror descent: no Delta", "Eq. 8: states of pi_t", "Eq. 9: no Delta", "Eq. 10: no ln Z"]),
    ("Lemma 3", "2 C sqrt(T ln Y)", at_most(check_lemma3), ["A^t not centred", "|A^t| up to 2 C"]),
    ("+ Lemma 3", "3/2, sqrt(2) C sqrt(T ln Y), attained", at_most(check_lemma3, sharp=True),
     ["|A^t| up to 2 C", "6 % less"]),
    ("Theorem 1", "exact update", at_most(check_theorem1),
     ["pi_1 not uniform", "offline prefixes", "comparator not covered"]),
    ("Theorem 1", "log-linear policies", at_most(check_theorem1, regressions=["log-linear"]), ["no eps term"]),
    ("Theorem 1", "sampled pairs", at_most(check_theorem1, regressions=["sampled", "stale"]), ["no eps term"]),
    ("Theorem 1", "first term, within 2.02", at_most(check_first_term), ["no H", "no C", "no ln Y", "no root"]),
    ("Theorem 1", "second term, attained", at_most(check_second_term),
     ["no H", "sqrt(H) for H", "no C_s", "no C_y", "eps / 4", "no root", "C_s as printed"]),
    ("Section 3.2", "with offline prefixes mixed in", at_most(check_second_term, logs=True),
     ["no C_s", "eps without the logs"]),
    ("Section 3.2", "closure gives APC 0; eta = infinity", equal(check_closure), ["class not closed", "eta = 1"]),
    ("Section 3.2", "the best C is not Z", at_most(check_free_C), ["complete features"]),
    ("Proposition 1", "APC error <= error of Q", at_most(check_prop1), ["C held at Z"]),
    ("Proposition 1", "intercepts explain the gap", equal(check_prop1_gap), ["one intercept"]),
    ("Proposition 2", "0 and 1", equal(check_prop2, tolerance=0), ["no features of y_1", "APC, y_1 as y_0"]),
    ("Section 3.1", "NPG is REFUEL's exact update", equal(check_npg), ["vanilla gradient"]),
    ("Section 3.1", "NPG's O(1/T), attained to 2 %", at_most(check_npg_rate),
     ["vanilla gradient", "no ln Y", "no max r"]),
    ("Section 3.1", "NPG linear, vanilla gradient c / T", equal(check_npg_linear, tolerance=0.05),
     ["NPG: vanilla gradient", "vanilla gradient: NPG"]),
    ("Section 2.1", "LT-MIXED's gap grows with H", at_most(check_shift_last_turn), ["own prefixes"]),
    ("Section 4.1", "MT-MIXED keeps a gap of 1/4", equal(check_shift_mt_mixed), ["logs that cover"]),
    ("Section 3", "REFUEL's gap goes to 0", at_most(check_shift_refuel), ["offline prefixes"]),
    ("+ Lengths", "H ~ U(K), h ~ U(H): sum_H J_H / H", equal(check_length_law), ["weights of the other draw"]),
    ("+ Lengths", "uniform over h <= H learns the mean",
     at_most(check_rule, right="uniform over h <= H", wrong="H ~ U(K), h ~ U(H)"), ["the paper's draw"]),
    ("+ DPO", "soft optimum on conversations", equal(check_dpo_user), ["a random user"]),
    ("+ DPO", "its step is eta ln(p/q)", equal(check_dpo_step), ["REFUEL's step", "labels without noise"]),
    ("+ DPO", "right side where laws are ordered", at_most(check_dpo_order), ["laws not ordered"]),
    ("+ DPO", "the gamble: REFUEL's gap is 0",
     at_most(check_rule, right="REFUEL on REFUEL's pairs", wrong="DPO on REFUEL's pairs"), ["DPO on the same pairs"]),
    ("+ Samples", "n eps tends to trace(G^+ M)", equal(check_samples, tolerance=0.2),
     ["four roll-outs as one", "prefix as if shared"]),
]


def run_check(where, statement, function, negatives, seed):
    """Prints the line of a check and of its negatives, on the same instances; true if all came out as they must."""
    began = time.time()
    result, *turned = [function(np.random.default_rng(seed), broken) for broken in ("", *negatives)]
    print(f"{where:<14}{statement:<38}{result.left:>11.4g} {result.sign:>2} {result.right:<11.4g}{result.instances:>4}"
          f"{result.worst:>9.0e}  {'holds' if result.holds else 'FAILS'}{time.time() - began:6.1f} s")
    for name, r in zip(negatives, turned):
        verdict = "DOES NOT FAIL" if r.holds else "fails, as it must"
        print(f"    negative: {name:<38}{r.left:>11.4g} {r.sign:>2} {r.right:<15.4g}{r.worst:>9.0e}  {verdict}")
    if result.note:
        print(f"    {result.note}")
    sys.stdout.flush()
    return result.holds and not any(r.holds for r in turned)


def draw_paper(axes, seed):
    """Theorem 1's bound and gap against T, NPG and vanilla gradient against T, the shift against H."""
    rng, Ts = np.random.default_rng(seed), [1, 3, 10, 30, 100, 300, 1000, 3000]
    mdp, pi_1 = tb.random_mdp(rng, 2, 3, 2), tb.uniform_policy((2, 3, 2))
    for i, name in enumerate(["exact", "log-linear", "stale"]):
        gain = regressor(name, mdp, rng)
        rows = [tb.theorem1(mdp, *tb.learn(mdp, gain, T, pi_1), tb.optimal_policy(mdp)) for T in Ts]
        axes[0].loglog(Ts, [m.gap for m in rows], f"C{i}o-", label=f"{name}: mean gap")
        axes[0].loglog(Ts, [m.regret_term + m.eps_term for m in rows], f"C{i}--", label=f"{name}: bound")
    axes[0].set(xlabel="T", ylabel="J(pi*) - J(pi_t)", title="Theorem 1")
    for i, H in enumerate((3, 5)):
        mdp, T = tb.lock(H), np.arange(1, 3001)
        axes[1].loglog(T, tb.gradient_gaps(mdp, 1.0, 3000), f"C{i}-", label=f"NPG = REFUEL, H = {H}")
        axes[1].loglog(T, tb.gradient_gaps(mdp, 1.0, 3000, natural=False), f"C{i}--", label=f"vanilla, H = {H}")
        axes[1].loglog(T, tb.npg_bound(mdp, 1.0) / T, f"C{i}:", label=f"NPG's bound, H = {H}")
    axes[1].set(xlabel="T", ylim=(1e-4, 30), title="Natural and vanilla policy gradient, eta = 1")
    for name in tb.METHODS:
        axes[2].plot(range(1, 11), [tb.shift_gap(name, H, T=200) for H in range(1, 11)], "o-", label=name)
    axes[2].set(xlabel="H", title="Covariate shift: prefixes and turns")


def draw_beyond(axes, seed):
    """The two draws of (H, h), DPO and REFUEL in the gamble, and the error of the regression against n."""
    for i, rule in enumerate(RULES):
        T = (60, 30)[i // 2]
        axes[i // 2].plot(np.arange(1, T + 1), rule_gaps(rule, T), label=rule)
    axes[0].set(xlabel="t", ylabel="gap of the mean over lengths", title="Answer or ask")
    axes[1].set(xlabel="t", ylabel="J(pi*) - J(pi_t)", title="The gamble")
    (mdp, pi), ns = sample_world(), np.array([60, 125, 250, 500, 1000, 2000])
    for i, (rollouts, shared) in enumerate(((1, True), (4, True), (1, False))):
        rng = np.random.default_rng(seed)
        eps = [sample_errors(rng, mdp, pi, n, 100, rollouts=rollouts, shared=shared).mean() for n in ns]
        axes[2].loglog(ns, eps, f"C{i}o", label=f"{rollouts} a branch, {'shared prefix' if shared else 'two prefixes'}")
        axes[2].loglog(ns, tb.sampling_limit(mdp, pi, rollouts, shared) / ns, f"C{i}-")
    axes[2].set(xlabel="n pairs", ylabel="eps", title="Samples: error, and its limit / n")


def draw_figures(folder, seed):
    """paper.png and beyond.png, three plots each."""
    import matplotlib.pyplot as plt
    plt.switch_backend("Agg")
    for draw, name in ((draw_paper, "paper.png"), (draw_beyond, "beyond.png")):
        figure, axes = plt.subplots(1, 3, figsize=(14, 4))
        draw(axes, seed)
        for axis in axes:
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(folder / name, dpi=80)
        plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="check_props.py", description="Numerical checks of the paper's statements.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw paper.png and beyond.png into this folder")
    args = parser.parse_args(argv)
    if args.seed < 0:
        parser.error(f"--seed must not be negative, got {args.seed}")
    if args.figures:
        try:
            args.figures.mkdir(parents=True, exist_ok=True)
            draw_figures(args.figures, args.seed)
        except (OSError, ImportError) as error:
            parser.error(f"--figures {args.figures}: {error}")
    print(f"{'in the paper':<14}{'statement':<38}{'left':>11}    {'right':<11}{'n':>4}{'worst':>9}  holds")
    good = [run_check(*check, args.seed) for check in CHECKS]
    print(f"{sum(good)} of {len(good)} numerical checks hold (+: beyond the paper), and fail without their premises")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
