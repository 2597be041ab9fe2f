"""Multi-turn conversations small enough that everything is computed exactly (sections 2 and 3, appendices A and B).

A finite-horizon MDP: H turns, numbered from 0, and one reward at the end, r(s_{H+1}) with s_{H+1} = (s_H, y_H). The
states of different turns are disjoint (section 3.2), so every table has a leading axis H. Roll-outs are computed twice:
by listing every future (`endings`), which is the definition, and by recursion (`q_values`).

Dimension key: H turns, S states a turn, A responses a state (the paper's Y), O = S * A endings (s_H, y_H),
d features, T iterations, n pairs; `...` any leading axes. float64; policies may be complex (see `minimise`).
"""
from typing import NamedTuple

import numpy as np


# ---- Section 2: the MDP, policies, roll-ins and roll-outs -----------------------------------------------------------

class MDP(NamedTuple):
    start: np.ndarray   # (S,) law of s_1, the paper's rho
    move: np.ndarray    # (H-1, S, A, S) law of s_{h+1} given s_h, y_h: the user
    reward: np.ndarray  # (S, A) r(s_{H+1}), or (H, S, A) where every turn has one (appendix A)

    @property
    def shape(self):
        return (len(self.move) + 1, *self.reward.shape[-2:])   # (H, S, A)

    @property
    def rewards(self):
        """(H, S, A), zero in all turns but the last where the reward is section 2's."""
        if self.reward.ndim == 3:
            return self.reward
        return np.concatenate([np.zeros((len(self.move), *self.reward.shape)), self.reward[None]])


def random_mdp(rng, H, S, A):
    """Rewards in [0, 1], and a user who may lead anywhere: a minimiser is unique only in states that are reached."""
    move = 0.9 * rng.dirichlet(np.full(S, 0.3), size=(H - 1, S, A)) + 0.1 / S
    return MDP(rng.dirichlet(np.full(S, 5.0)), move, rng.uniform(size=(S, A)))


def log_softmax(x):
    """No maximum is subtracted, because that is not differentiable."""
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def random_policy(rng, shape):
    return softmax(rng.normal(size=shape))


def uniform_policy(shape):
    return np.full(shape, 1 / shape[-1])


def endings(mdp, pi):
    """Roll-outs: law of the ending (s_H, y_H) after y_h at s_h, (H, S, A, O), by listing every future."""
    H, S, A = mdp.shape
    law = np.zeros((H, S, A, S, A))

    def follow(origin, prob, h, s, y):
        if h == H - 1:
            law[origin][s, y] += prob
            return
        for s2 in range(S):
            for y2 in range(A):
                follow(origin, prob * mdp.move[h, s, y, s2] * pi[h + 1, s2, y2], h + 1, s2, y2)

    for origin in np.ndindex(H, S, A):
        follow(origin, 1.0, *origin)
    return law.reshape(H, S, A, S * A)


def q_by_listing(mdp, pi):
    """Q_h^pi(s, y), (H, S, A), by its definition: the mean reward over all futures."""
    return endings(mdp, pi) @ mdp.reward.ravel()


def q_values(mdp, pi):
    """Q_h^pi(s, y), (..., H, S, A), by backward recursion."""
    rewards = mdp.rewards
    q = [np.broadcast_to(rewards[-1], pi[..., 0, :, :].shape)]
    for h in reversed(range(mdp.shape[0] - 1)):
        v = (pi[..., h + 1, :, :] * q[0]).sum(-1)              # (..., S)
        q.insert(0, rewards[h] + np.inner(v, mdp.move[h]))     # (..., S, A)
    return np.stack(q, -3)


def occupancy(mdp, pi):
    """Roll-ins: d_h^pi(s), (..., H, S), by forward recursion."""
    d = [np.broadcast_to(mdp.start, pi[..., 0, :, 0].shape)]
    for h in range(mdp.shape[0] - 1):
        joint = d[-1][..., None] * pi[..., h, :, :]            # (..., S, A)
        d.append(np.tensordot(joint, mdp.move[h], 2))
    return np.stack(d, -2)


def performance(mdp, pi):
    """J(pi), (...)."""
    return (mdp.start * (pi * q_values(mdp, pi)).sum(-1)[..., 0, :]).sum(-1)


def advantage(pi, f):
    """f minus its mean under pi in every state: A_h^pi for f = Q_h^pi, and the centred Delta^t for f = Delta^t."""
    return f - (pi * f).sum(-1, keepdims=True)


def optimal_policy(mdp):
    """The best policy, by backward induction: a deterministic comparator pi^*."""
    pi = uniform_policy(mdp.shape)
    for h in reversed(range(mdp.shape[0])):
        pi[h] = np.eye(mdp.shape[-1])[q_values(mdp, pi)[h].argmax(-1)]
    return pi


# ---- Section 3: the update, the data set as a law, and the losses ---------------------------------------------------

def reweigh(pi, gain, eta):
    """pi exp(eta gain) / Z, (..., H, S, A)."""
    weight = pi * np.exp(eta * (gain - gain.max(-1, keepdims=True)))
    return weight / weight.sum(-1, keepdims=True)


def refuel_step(mdp, pi, eta):
    """Eq. 3, REFUEL's exact update pi exp(eta Q^pi) / Z, (H, S, A)."""
    return reweigh(pi, q_values(mdp, pi), eta)


def pair_law(mdp, pi, future=None, coupling=""):
    """Line 3 of Algorithm 1 as a law: probability of h, s, y, y' and both endings, (H, S, A, A, O, O).

    h is uniform, s ~ d_h^pi, y and y' ~ pi, and both futures follow pi (or `future`), all independently, or as the
    coupling says: the same random numbers drive both futures, y' and its future belong to another prefix than s, or
    y' has seen y's future and is ~ pi after a good one, uniform after a poor one."""
    assert coupling in ("", "common random numbers", "y' at another prefix", "y' saw y's future")
    law = endings(mdp, pi if future is None else future)
    law2, pi2 = law, pi
    if coupling == "y' at another prefix":
        law2, pi2 = np.roll(law, 1, axis=1), np.roll(pi, 1, axis=1)
    weight = np.einsum("hs,hsa,hsb->hsab", occupancy(mdp, pi) / mdp.shape[0], pi, pi2)
    y, y2 = np.s_[:, :, :, None, :, None], np.s_[:, :, None, :, None, :]
    joint = law[y] * law2[y2]
    if coupling == "common random numbers":
        upper, lower = law.cumsum(-1), law.cumsum(-1) - law
        joint = np.maximum(0, np.minimum(upper[y], upper[y2]) - np.maximum(lower[y], lower[y2]))
    if coupling == "y' saw y's future":
        ending = mdp.reward.ravel()
        uniform = joint / pi[:, :, None, :, None, None] / mdp.shape[-1]
        joint = np.where((ending < ending.mean())[:, None], uniform, joint)
    return weight[..., None, None] * joint


def pair_difference(f):
    """f(y) - f(y') for every pair of responses: (..., A) -> (..., A, A)."""
    return f[..., :, None] - f[..., None, :]


def eq1_loss(mdp, law, log_ratio, eta):
    """Eq. 1 and 7 with the exact expectation over the pairs; log_ratio = ln pi / pi_t (..., H, S, A) -> (...)."""
    future = pair_difference(mdp.reward.ravel())               # (O, O) r(s_{H+1}) - r(s'_{H+1})
    residual = pair_difference(log_ratio)[..., None, None] / eta - future
    return (law * residual**2).sum((-6, -5, -4, -3, -2, -1))


def eq6_loss(law, q, log_ratio, eta):
    """Eq. 6: as Eq. 1, but regressing the difference of the true Q (H, S, A)."""
    return (law.sum((-2, -1)) * (pair_difference(log_ratio) / eta - pair_difference(q))**2).sum((-4, -3, -2, -1))


def minimise(f, x):
    """The minimiser of f near x, (n,), by damped Newton steps; f maps (m, n) to (m,) and must be analytic."""
    unit = np.eye(len(x))

    def gradient(z):   # a complex step has no cancellation: f(x + i e) = f(x) + i e f'(x)
        return f(z + 1e-30j * unit).imag / 1e-30

    damping = 1e-3
    for _ in range(200):
        g = gradient(x)
        if np.abs(g).max() < 1e-14:
            return x
        hessian = np.stack([gradient(x + 1e-5 * e) - gradient(x - 1e-5 * e) for e in unit]) / 2e-5
        step = np.linalg.solve(hessian + damping * unit, g)
        step = step / max(1, np.abs(step).max())
        better = f((x - step)[None])[0] <= f(x[None])[0] + 1e-15   # rounding near the optimum
        x = x - step if better else x
        damping = max(damping / 10, 1e-9) if better else damping * 10
    raise RuntimeError(f"the optimiser did not converge: its gradient is still {np.abs(g).max():.1e}")


def best_policy(loss, shape):
    """The minimiser of loss over all policies; loss maps ln pi (m, H, S, A) to (m,)."""
    x = minimise(lambda x: loss(log_softmax(x.reshape(-1, *shape))), np.zeros(np.prod(shape)))
    return softmax(x.reshape(shape))


def log_linear_gain(mdp, phi, pi):
    """The minimiser of Eq. 6 among log-linear policies, ln(pi'/pi) = eta w.phi + const: w.phi, (H, S, A)."""
    mass = np.sqrt(occupancy(mdp, pi)[..., None] * pi)
    x = mass[..., None] * np.moveaxis(advantage(pi[..., None, :], np.moveaxis(phi, -1, -2)), -1, -2)
    y = mass * advantage(pi, q_values(mdp, pi))
    return phi @ np.linalg.lstsq(x.reshape(-1, phi.shape[-1]), y.ravel(), rcond=None)[0]


def sample_pairs(rng, mdp, pi, n, rollouts=1, shared=True):
    """Line 3 of Algorithm 1, n times: h, s, s', y, y' and two rewards, each the mean of `rollouts` futures, all (n,).
    s' is s, or unless `shared` the prefix of another conversation."""
    H = mdp.shape[0]

    def draw(law, *place):
        """n outcomes of law[place], each the number of its cumulative sums that lie below a uniform number."""
        u, sums = rng.uniform(size=n), law.cumsum(-1)
        return sum((sums[(*place, k)] < u for k in range(law.shape[-1] - 1)), np.zeros(n, int))

    def prefix():
        s = draw(mdp.start)
        for g in range(H - 1):
            s = np.where(g < h, draw(mdp.move, g, s, draw(pi, g, s)), s)
        return s

    def rollout(s, y):
        for g in range(H - 1):
            on = g >= h                                        # this conversation has reached its reset
            s2 = draw(mdp.move, g, s, y)
            y, s = np.where(on, draw(pi, g + 1, s2), y), np.where(on, s2, s)
        return mdp.reward[s, y]

    h = rng.integers(H, size=n)
    s = prefix()
    s2 = s if shared else prefix()
    y, y2 = draw(pi, h, s), draw(pi, h, s2)
    r, r2 = np.mean([(rollout(s, y), rollout(s2, y2)) for _ in range(rollouts)], axis=0)
    return h, s, s2, y, y2, r, r2


def centring(pi):
    """The matrices that take f (S*A) to `advantage` of f, one a turn, (H, S*A, S*A)."""
    H, S, A = pi.shape
    return np.eye(S * A) - np.kron(np.eye(S), np.ones((A, A))) * pi.reshape(H, 1, S * A)


def sampled_gain(pi, h, s, s2, y, y2, r, r2):
    """The smallest g that fits g(s, y) - g(s', y') to r - r' best, g centred in every state, (H, S, A).
    With s' = s it is the minimiser of Eq. 1 over all policies, as ln(pi'/pi) / eta; what no pair has seen stays."""
    H, S, A = pi.shape
    N, a, b = S * A, s * A + y, s2 * A + y2

    def pairs(row, column):
        return np.bincount((h * N + row) * N + column, minlength=H * N * N).reshape(H, N, N)

    def rewards(row):
        return np.bincount(h * N + row, r - r2, H * N).reshape(H, N)

    gram, target = pairs(a, a) + pairs(b, b) - pairs(a, b) - pairs(b, a), rewards(a) - rewards(b)
    centre = centring(pi)
    gram = centre.transpose(0, 2, 1) @ gram @ centre
    target = centre.transpose(0, 2, 1) @ target[..., None]
    return (np.linalg.pinv(gram, rcond=1e-10, hermitian=True) @ target).reshape(pi.shape)


def relative_error(mdp, pi, gain):
    """Left side of Assumption 1 for ln(pi'/pi) = eta gain + const; leading axes of gain stay, (...)."""
    pairs = (occupancy(mdp, pi) / mdp.shape[0])[..., None, None] * pi[..., :, None] * pi[..., None, :]
    return (pairs * pair_difference(gain - q_values(mdp, pi))**2).sum((-4, -3, -2, -1))


def sampling_limit(mdp, pi, rollouts=1, shared=True):
    """What n times the error of `sampled_gain` on n pairs tends to: sum over turns of trace(G^+ M).
    G = E x x^T and M = E x x^T e^2, x the features of a pair, e what the best fit leaves of r - r': the noise of the
    futures and, without a shared prefix, V(s) - V(s')."""
    H, S, A = mdp.shape
    law, d, r = endings(mdp, pi).reshape(H, S * A, S * A), occupancy(mdp, pi), mdp.reward.ravel()
    total = 0.0
    for h in range(H):
        p, q = (d[h][:, None] * pi[h]).ravel(), law[h] @ r
        pair = p[:, None] * p
        if shared:
            pair = pair * np.kron(np.diag(1 / d[h]), np.ones((A, A)))
        noise = law[h] @ r**2 - q**2
        centre = centring(pi)[h]
        e2 = (noise[:, None] + noise) / rollouts + pair_difference(q - centre @ q)**2
        x = (centre[:, None] - centre).reshape(-1, S * A)      # (pairs, S*A)
        G, M = [(x * w.reshape(-1, 1)).T @ x for w in (pair, pair * e2)]
        total += np.trace(np.linalg.pinv(G, rcond=1e-10) @ M)
    return total


# ---- Appendix A: mirror descent, and what Theorem 1 speaks of -------------------------------------------------------

def bounded(a, p, C, centre=True):
    """a with its mean under p taken out (unless told not to) and shrunk until |a| <= C, (n, A)."""
    a = a - (p * a).sum(-1, keepdims=True) if centre else a
    return a * np.minimum(1, C / np.abs(a).max(-1, keepdims=True))


def worst_sums(T, A, eta, C, centre=True):
    """max_y sum_t A^t(y) of mirror descent in one state, on A^t built to be worst, for 11 lengths of the wait, (11,).
    While waiting, y* = 0 gains just what keeps pi_t(y*) in place, and the other responses swing by +-C in two halves,
    which costs the policy eta^2 C^2 / 2 a step. Then y* sprints: it takes C a step until pi_t(y*) is near 1."""
    wait = (T - np.log(A) / (eta * C) * np.linspace(0.5, 3, 11)).astype(int)[:, None]
    half, total = np.arange(A) % 2 == 1, np.zeros((1, A))
    for t in range(T):
        p = softmax(eta * (total - total.max(-1, keepdims=True)))
        light = np.where((p * half).sum(-1) <= (p * ~half).sum(-1) - p[:, 0], C, -C)[:, None]
        waiting = light * np.where(half, 1.0, -1.0)
        waiting[:, 0] = (p[:, 1:] * waiting[:, 1:]).sum(-1) / p[:, 1:].sum(-1) + eta * C**2 / 2
        sprint = np.where(np.arange(A) == 0, 1.0, -p[:, :1] / (1 - p[:, :1]))
        sprint = C * sprint / np.abs(sprint).max(-1, keepdims=True)
        total = total + bounded(np.where(t < wait, waiting, sprint), p, C, centre)
    return total.max(-1)


def learn(mdp, gain, T, first, Y=None):
    """T REFUEL updates of `first` with eta = sqrt(ln Y / (C^2 T)), as in Lemma 3: policies (T+1, H, S, A), eta, C.

    gain(pi) is ln(pi'/pi) / eta. C must bound |A^t|, known only after the run: while it was broken, run again with a
    larger one. Y is A unless responses that are alike were lumped."""
    C = 1.0
    for _ in range(10):
        eta = np.sqrt(np.log(Y or mdp.shape[-1]) / (C**2 * T))
        pis, gains = [first], []
        for _ in range(T):
            gains.append(gain(pis[-1]))
            pis.append(reweigh(pis[-1], gains[-1], eta))
        # A^t = A^pi + Delta - Delta_pi is the centred gain: the Q in A^pi and the Q in Delta cancel.
        measured = np.abs(advantage(np.stack(pis[:-1]), np.stack(gains))).max()
        if measured <= C + 1e-12:
            return np.stack(pis), eta, C
        C = 1.1 * measured
    raise RuntimeError(f"no C bounds the advantages: {measured} > {C}")


class Theorem1(NamedTuple):
    eps: float   # Assumption 1, the largest over t
    C_s: float   # Assumption 2, states
    C_y: float   # Assumption 2, responses
    covered: bool        # whether both are finite; if not, they are taken over what is covered
    gap: float   # mean over t of J(pi^*) - J(pi_t), which is at least the gap of the best t
    regret_term: float   # 2 C H sqrt(ln Y / T)
    eps_term: float      # H sqrt(C_s C_y eps / 2)


def theorem1(mdp, pis, eta, C, comparator, roll_in=None, Y=None):
    """Every quantity of Theorem 1, measured; roll_in (..., H, S) replaces d^{pi_t} in both assumptions."""
    H, _, A = mdp.shape
    T, pi = len(pis) - 1, pis[:-1]
    q, star = q_values(mdp, pi), occupancy(mdp, comparator)
    d = np.broadcast_to(occupancy(mdp, pi) if roll_in is None else roll_in, q.shape[:-1])
    log = np.log(np.maximum(pis, 1e-300))
    error = pair_difference((log[1:] - log[:-1]) / eta - q)**2              # (T, H, S, A, A)
    pairs = pi[..., :, None] * pi[..., None, :]
    eps = ((pairs * error).sum((-2, -1)) * d).sum((-2, -1)).max() / H
    # A state or response the comparator never meets needs no cover.
    C_s = np.divide(star, d, out=np.zeros_like(d), where=(star > 0) & (d > 0)).max()
    C_y = np.divide(comparator, pi, out=np.zeros_like(pi), where=(comparator > 0) & (pi > 0)).max()
    covered = not ((star > 0) & (d == 0)).any() and not ((comparator > 0) & (pi == 0)).any()
    gap = performance(mdp, comparator) - performance(mdp, pi).mean()
    regret_term, eps_term = 2 * C * H * np.sqrt(np.log(Y or A) / T), H * np.sqrt(C_s * C_y * eps / 2)
    return Theorem1(eps, C_s, C_y, covered, gap, regret_term, eps_term)


def narrow_gate(H, Y, e=1e-3):
    """The MDP on which Theorem 1's second term is attained, the uniform policy and the comparator.
    States good, bad, happy; s_1 is happy with probability H e / Y. In turn 1 response 0 stays in good, others lead to
    bad; later it leads to happy with probability e. The reward is 1 in happy, e for response 0 in good. Responses 1 to
    Y-1 are alike: lumped into one."""
    kappa, eye = H * e / Y, np.eye(3)
    move = np.broadcast_to(eye[:, None], (H - 1, 3, 2, 3)).copy()
    move[1:, 0, 0] = (1 - e) * eye[0] + e * eye[2]
    move[0, 0, 1] = eye[1]
    mdp = MDP((1 - kappa) * eye[0] + kappa * eye[2], move, np.array([[e, 0.0], [0.0, 0.0], [1.0, 1.0]]))
    comparator = np.full(mdp.shape, [1.0, 0.0])
    return mdp, np.full(mdp.shape, [1 / Y, 1 - 1 / Y]), comparator


# ---- Section 3.2 and appendix B: the two approximation errors -------------------------------------------------------

def apc_by_search(mdp, phi, theta, eta, partition=False):
    """The APC condition as written, minimised over pi' in Pi and C > 0 (or with C = Z): the least value and ln C."""
    pi, d = softmax(phi @ theta), len(theta)
    q, mass = q_by_listing(mdp, pi), occupancy(mdp, pi)[..., None] * pi / mdp.shape[0]
    log_Z = np.log((pi * np.exp(eta * q)).sum(-1))

    def loss(x):
        log_C = log_Z if partition else x[:, d:].reshape(-1, *log_Z.shape)
        log_new = log_softmax(np.moveaxis(phi @ x[:, :d].T, -1, 0))
        return (mass * ((log_new - np.log(pi) - eta * q + log_C[..., None]) / eta)**2).sum((-3, -2, -1))
    x = minimise(loss, theta if partition else np.concatenate([theta, log_Z.ravel()]))
    return float(loss(x[None])[0]), log_Z if partition else x[d:].reshape(log_Z.shape)


def weighted_design(mdp, phi, pi):
    """Features (H*S*A, d), one indicator a state (H*S*A, H*S) and Q (H*S*A,), scaled by the root of the probability of
    h uniform, s ~ d_h^pi, y ~ pi: least squares on them is under that law."""
    H, S, A = mdp.shape
    root = np.sqrt(occupancy(mdp, pi)[..., None] * pi / H).reshape(-1, 1)
    states = np.repeat(np.eye(H * S), A, axis=0)
    return root * phi.reshape(H * S * A, -1), root * states, root[:, 0] * q_values(mdp, pi).ravel()


def residual_error(x, y):
    """min_w |y - x w|^2."""
    return float(((y - x @ np.linalg.lstsq(x, y, rcond=None)[0])**2).sum())


def best_log_C(mdp, phi, theta, eta):
    """ln C(s) of the smallest APC error, (H, S), from its pi' = pi exp(w.phi) / N: ln N + E_pi (eta Q - w.phi)."""
    pi = softmax(phi @ theta)
    x, states, q = weighted_design(mdp, phi, pi)
    w = np.linalg.lstsq(np.hstack([x / eta, states]), q, rcond=None)[0][:len(theta)]
    log_N = np.log((pi * np.exp(phi @ w)).sum(-1))
    return log_N + (pi * (eta * q_values(mdp, pi) - phi @ w)).sum(-1)


def apc_error(mdp, phi, theta, eta):
    """Left side of the APC condition at pi_theta: least squares of Q on features and one intercept a state, -ln C."""
    x, states, q = weighted_design(mdp, phi, softmax(phi @ theta))
    return residual_error(np.hstack([x / eta, states]), q)


def q_approx_error(mdp, phi, theta):
    """Left side of the condition of NPG (Proposition 1) at pi_theta: the same least squares without intercepts."""
    x, _, q = weighted_design(mdp, phi, softmax(phi @ theta))
    return residual_error(x, q)


# ---- Sections 3.1 and 2.1: methods, and MDPs to compare them on -----------------------------------------------------

def update_gaps(mdp, step, T, first=None):
    """J(pi*) - J(pi_t) for t = 1..T, (T,), from the uniform policy or `first`; step maps pi_t to pi_{t+1}."""
    pis = [uniform_policy(mdp.shape) if first is None else first]
    for _ in range(T - 1):
        pis.append(step(pis[-1]))
    return performance(mdp, optimal_policy(mdp)) - performance(mdp, np.stack(pis))


def gradient_gaps(mdp, eta, T, natural=True, first=None):
    """`update_gaps` of NPG (= exact REFUEL) or of vanilla policy gradient; either adds to the logits of a softmax."""
    def step(pi):
        gain = advantage(pi, q_values(mdp, pi))
        return reweigh(pi, gain if natural else occupancy(mdp, pi)[..., None] * pi * gain, eta)
    return update_gaps(mdp, step, T, first)


def npg_bound(mdp, eta):
    """H (ln Y / eta + max r), which bounds sum_t J(pi*) - J(pi_t) for every T, every eta and r >= 0.

    gap_t = sum_h E_{d*} (KL_t - KL_{t+1} + ln Z_t) / eta, and V^{t+1}(s) - V^t(s) >= ln Z_t(s) / eta >= 0
    (Agarwal et al., 2021, for a finite horizon): both sums telescope."""
    return mdp.shape[0] * (np.log(mdp.shape[-1]) / eta + mdp.reward.max())


def lock(H, A=3):
    """One right response a turn, the reward 1 only after H of them: the gradient of J starts at A^-H."""
    move = np.zeros((H - 1, 2, A, 2))
    move[..., 1] = 1
    move[:, 0, 0] = [1, 0]
    reward = np.zeros((2, A))
    reward[0, 0] = 1
    return MDP(np.array([1.0, 0.0]), move, reward)


def shop(H):
    """Section 2.1 as a shop with a random customer; returns the MDP and the clerk (H, S, A) who wrote the logs.
    State 0: not asked. Responses 0 and 1 talk on, 2 asks; the customer answers at random "red" (state 1) or "blue" (2),
    anew in every turn. The last response sells: 0 is worth 3/4 in state 0 and 1 in state 1, 1 is worth 1 in state 2.
    The clerk never asks. Asking is best, but before anything is learned it leads to blind selling, worth 1/3."""
    move = np.zeros((H - 1, 3, 3, 3))
    move[:, 0, :2, 0] = 1
    move[:, 0, 2, 1:] = 1 / 2
    move[:, 1:, :, 1:] = 1 / 2
    clerk = uniform_policy((H, 3, 3))
    clerk[:, 0] = [1 / 2, 1 / 2, 0]
    return MDP(np.array([1.0, 0.0, 0.0]), move, np.array([[3 / 4, 0, 0], [1, 0, 0], [0, 1, 0]])), clerk


METHODS = {   # name -> (whose prefixes, the last turn only)
    "LT-MIXED": ("logs", True), "LT-ONLINE": ("own", True), "MT-MIXED": ("logs", False), "REFUEL": ("own", False)}


def shift_gap(method, H, clerk_random=0.0, T=1000, eta=1.0):
    """J(pi*) - J after T exact regressions of Eq. 1 in `shop(H)`, with a method's prefixes and turns.
    A state with any weight is fitted exactly, one with none stays as it is: only the support matters."""
    (prefixes, last_only), (mdp, clerk) = METHODS[method], shop(H)
    clerk = (1 - clerk_random) * clerk + clerk_random * uniform_policy(mdp.shape)

    def step(pi):
        seen = occupancy(mdp, clerk if prefixes == "logs" else pi) > 0
        seen[:-1] &= not last_only
        return np.where(seen[..., None], refuel_step(mdp, pi, eta), pi)
    return update_gaps(mdp, step, T + 1)[-1]


# ---- Beyond the paper: the law of (H, h), DPO and a random user -----------------------------------------------------

def ending_at(mdp, H):
    """The conversations of H turns, with the reward of turn H."""
    return MDP(mdp.start, mdp.move[:H - 1], mdp.rewards[H - 1])


def length_draw(K, uniform=False):
    """P(H, h), (K, K): the paper's H ~ U(K), h ~ U(H), or uniform over all h <= H."""
    allowed = np.tri(K)
    return allowed / (allowed.sum() if uniform else K * allowed.sum(1, keepdims=True))


def length_step(mdp, pi, draw, eta):
    """The minimiser of Eq. 1 with H and h from draw (K, K): pi exp(eta sum_H P(H | h) Q_{h,H}) / Z."""
    q = np.zeros(mdp.shape)
    for H in range(1, len(draw) + 1):
        q[:H] += (draw / draw.sum(0))[H - 1, :H, None, None] * q_values(ending_at(mdp, H), pi[:H])
    return reweigh(pi, q, eta)


def answer_or_ask():
    """K = 2. Answering now (0) earns 0.6 if the talk ends after one turn, asking (1) earns 1 if it goes on."""
    reward = np.array([[[0.6, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 1.0]]])
    return MDP(np.array([1.0, 0.0]), np.eye(2)[None, None].repeat(2, axis=1), reward)


def soft_optimum(mdp, ref, eta):
    """The maximiser of J(pi) - KL(pi || ref) / eta over whole conversations: ref exp(eta Q) / Z with soft values."""
    pi, q = ref.copy(), mdp.reward
    for h in reversed(range(mdp.shape[0])):
        pi[h] = reweigh(ref[h], q, eta)
        v = np.log((ref[h] * np.exp(eta * q)).sum(-1)) / eta
        q = mdp.move[h - 1] @ v if h else None
    return pi


def conversation_dpo(mdp, ref, eta):
    """The minimiser of DPO's loss on pairs of whole conversations of ref that share s_1, with Bradley-Terry labels."""
    H, S, A = mdp.shape
    index = np.indices((S, A) * H).reshape(2 * H, -1)
    s, y, turn = index[::2].T, index[1::2].T, np.arange(H)     # (N, H): every conversation
    prob = ref[turn, s, y].prod(1) * mdp.move[turn[:-1], s[:, :-1], y[:, :-1], s[:, 1:]].prod(1)
    weight = mdp.start[s[:, 0]] * prob * prob[:, None] * (s[:, :1] == s[:, 0])
    label = 1 / (1 + np.exp(-pair_difference(mdp.reward[s[:, -1], y[:, -1]])))

    def loss(logp):
        ratio = (logp - np.log(ref))[..., turn, s, y].sum(-1)  # (m, N)
        return (weight * label * np.log(1 + np.exp(-pair_difference(ratio) / eta))).sum((-2, -1))
    return best_policy(loss, mdp.shape)


def dpo_step(mdp, pi, eta, noise=0.0):
    """DPO's exact update on REFUEL's pairs, two responses a state: their log-ratio moves by eta ln(p/q), p and q the
    chances that either's future earns more if `noise` of the labels are turned around."""
    law, r = endings(mdp, pi), mdp.reward.ravel()
    higher = np.einsum("hsao,op,hsbp->hsab", law, pair_difference(r) > 0, law)
    wins = (1 - noise) * higher + noise * higher.swapaxes(-1, -2)
    p, q = wins[..., 0, 1], wins[..., 1, 0]
    move = np.log(np.where(p > 0, p, 1.0)) - np.log(np.where(q > 0, q, 1.0))   # without a label nothing moves
    return reweigh(pi, np.stack([move, np.zeros_like(move)], -1), eta)


def gamble():
    """Turn 1: play safe (0, worth 0.5), or a gamble (1) that the user takes well (chance 0.6, worth 0.6) or badly."""
    move = np.zeros((1, 3, 2, 3))
    move[0, :, 0, 0] = 1
    move[0, :, 1] = [0, 0.6, 0.4]
    return MDP(np.array([1.0, 0.0, 0.0]), move, np.array([[0.5, 0.0], [0.6, 0.0], [0.0, 0.0]]))
