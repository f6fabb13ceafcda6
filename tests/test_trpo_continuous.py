"""What trpo_continuous.py has of its own: the step of the policy, and its loop.

What it has word for word like ppo_cartpole.py and ppo_continuous.py is tested with them.
"""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
import trpo_continuous as script
from diary import (
    Diary, Pays, check_episodes, check_ppo_rewards, check_ppo_statistics, check_settings,
    recorded, side_by_side, train,
)  # fmt: skip
from gymnasium.spaces import Box
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call, jacrev

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 2000 --num-steps 64 --num-minibatches 4 --update-epochs 2 --norm-obs "
    "--norm-reward --checkpoint-frequency 500 --eval-frequency 700 --eval-episodes 5"
)
OWN = "continuous"
OWN_FLAGS = "--total-timesteps 10000 --num-steps 64 --target-kl 0.05"
WRONG_SPACES = ["CartPole-v1", "cases:HugeBounds-v0"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-steps 0", "--num-steps"),
    ("--num-envs 1 --num-steps 5 --num-minibatches 3", "--num-minibatches"),
    ("--target-kl 0", "--target-kl"),
    ("--cg-damping -0.1", "--cg-damping"),
    ("--line-search-shrink 1.5", "--line-search-shrink"),
]
LEARNS = [("--env-id cases:Aim-v0 --total-timesteps 80000 --num-steps 128 --target-kl 0.05", 9)]
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {"Hopper-v5": "Zoo 3618 (1M)", "Walker2d-v5": "Zoo 4933 (1M)"}
# How speed.py measures the script, and beside what; its first lines explain the form.
SPEED = {
    "steps": 30_000,
    "first": 2_048,
    "peers": {
        "sb3-contrib's TRPO": {
            "env_id": "Pendulum-v1",
            "num_envs": 1,
            "normalize": True,
            "settings": {
                "n_steps": 2048,
                "batch_size": 128,
                "n_critic_updates": 10,
                "cg_max_steps": 15,
                "learning_rate": 1e-3,
                "device": "cpu",
            },
            "equal": "one environment, compiled",
        },
    },
    "flags": "--env-id Pendulum-v1 --num-steps 2048 --num-minibatches 16 --update-epochs 10 "
    "--cg-iterations 15 --target-kl 0.01 --gamma 0.99 --learning-rate 1e-3",
    "variants": {
        "one environment, compiled": "--num-envs 1 --compile",
        "one environment": "--num-envs 1",
    },
    "floors": {"floor": "2048 6144 --num-envs 1"},
}

# ---- The divergence and the surrogate ------------------------------------------------------------


def test_kl_against_pytorchs_own_in_this_direction():
    torch.manual_seed(0)
    means, old_means = torch.randn(2, 6, 3).double()
    log_std, old_log_std = torch.randn(2, 3).double()
    new, old = (
        Independent(Normal(m, s.exp()), 1) for m, s in [(means, log_std), (old_means, old_log_std)]
    )
    found = script.kl(means, log_std, old_means, old_log_std)
    torch.testing.assert_close(found, kl_divergence(old, new).mean())
    assert not torch.isclose(found, kl_divergence(new, old).mean(), rtol=0.1)


def make_agent(norm_obs=True):
    torch.manual_seed(0)
    return script.Agent(3, np.float32([-2, 0]), np.float32([2, 10]), norm_obs)


def small_agent(hidden=4):
    """In float64, with all weights random: 3 numbers of an observation, 2 of an action."""
    agent = make_agent(norm_obs=False)
    agent.actor = torch.nn.Sequential(
        torch.nn.Linear(3, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 2)
    )
    agent.double().log_std.data[:] = torch.tensor([-0.5, 0.3])
    return agent


def make_batch(agent, rows=50):
    """Steps that this agent sampled, with random advantages of mean 0."""
    obs = torch.randn(rows, 3).to(agent.log_std.dtype)
    with torch.no_grad():
        means = agent.actor(agent.normalize(obs))
        actions = means + agent.log_std.exp() * torch.randn_like(means)
        log_probs, _ = script.log_prob_and_entropy(means, agent.log_std, actions)
    advantages = torch.randn_like(log_probs)
    return script.Batch(obs, actions, log_probs, advantages - advantages.mean(), log_probs)


def policy_gradient(agent, batch):
    """Mean of A * the gradient of log pi(a|s), by PyTorch's own distribution."""
    policy = Independent(Normal(agent.actor(agent.normalize(batch.obs)), agent.log_std.exp()), 1)
    loss = (policy.log_prob(batch.actions) * batch.advantages).mean()
    return script.flatten(torch.autograd.grad(loss, script.policy_weights(agent)))


def test_the_gradient_of_the_surrogate_is_the_policy_gradient_at_pi_old():
    agent = small_agent()
    batch = make_batch(agent)
    objective = script.surrogate(agent.actor(batch.obs), agent.log_std, batch)
    torch.testing.assert_close(objective, batch.advantages.mean())
    found = torch.autograd.grad(objective, script.policy_weights(agent))
    torch.testing.assert_close(script.flatten(found), policy_gradient(agent, batch))


def test_the_surrogate_away_from_pi_old():
    """With importance weights: the mean of A under pi, from the samples of pi_old."""
    agent = small_agent()
    batch, means, log_std = make_batch(agent), torch.randn(50, 2).double(), torch.zeros(2).double()
    ratios = (Independent(Normal(means, 1.0), 1).log_prob(batch.actions) - batch.log_probs).exp()
    found = script.surrogate(means, log_std, batch)
    torch.testing.assert_close(found, (ratios * batch.advantages).mean())


# ---- The Fisher matrix ---------------------------------------------------------------------------


def weights_of(agent):
    return {f"actor.{name}": weight.detach() for name, weight in agent.actor.named_parameters()} | {
        "log_std": agent.log_std.detach()
    }


def fisher_matrix(agent, obs):
    """By its definition, the mean over states of E[grad log pi (grad log pi)^T].

    The expectation over actions is exact: Gauss-Hermite quadrature of degree 5 in each number, for
    a polynomial of degree 4.
    """
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(3)
    nodes, node_weights = torch.tensor(nodes), torch.tensor(node_weights / np.sqrt(2 * np.pi))
    noise = torch.cartesian_prod(nodes, nodes)  # (9, 2)
    shares = torch.cartesian_prod(node_weights, node_weights).prod(-1)

    def log_probs(weights, row, action):
        weights, log_std = dict(weights), weights["log_std"]
        actor = {n.removeprefix("actor."): w for n, w in weights.items() if n != "log_std"}
        means = functional_call(agent.actor, actor, (row,))
        return Independent(Normal(means, log_std.exp()), 1).log_prob(action)

    total = 0.0
    for row in obs:
        for sample, share in zip(noise, shares):
            with torch.no_grad():
                action = agent.actor(row) + agent.log_std.exp() * sample
            score = script.flatten(jacrev(log_probs)(weights_of(agent), row, action).values())
            total = total + share * torch.outer(score, score) / len(obs)
    return total


def products(agent, obs, damping):
    """The whole matrix from the script's products, column by column."""
    weights, means = script.policy_weights(agent), agent.actor(obs)
    log_std = agent.log_std
    divergence = script.kl(means, log_std, means.detach(), log_std.detach())
    gradient = script.flatten(torch.autograd.grad(divergence, weights, create_graph=True))
    assert gradient.abs().max() < 1e-12
    columns = torch.eye(len(gradient)).double()
    return torch.stack(
        [script.fisher_vector_product(gradient, weights, v, damping) for v in columns], dim=1
    )


def test_fisher_vector_products_against_the_matrix_by_its_definition():
    agent = small_agent()
    obs = torch.randn(7, 3).double()
    matrix = fisher_matrix(agent, obs)
    torch.testing.assert_close(products(agent, obs, 0.0), matrix)
    damped = matrix + 0.3 * torch.eye(len(matrix)).double()
    torch.testing.assert_close(products(agent, obs, 0.3), damped)


def test_vectors_and_weights_are_in_one_order():
    agent = make_agent()
    weights = script.policy_weights(agent)
    critic = [weight.clone() for weight in agent.critic.parameters()]
    places = [weight.data_ptr() for weight in weights]
    vector = torch.arange(float(sum(weight.numel() for weight in weights)))
    with torch.no_grad():
        script.set_weights(weights, vector)
    assert script.flatten(weights).equal(vector) and agent.log_std.equal(vector[-2:])
    assert [weight.data_ptr() for weight in weights] == places  # the Actor shares them
    assert all(map(torch.equal, agent.critic.parameters(), critic))


# ---- Conjugate gradients -------------------------------------------------------------------------


def positive_definite(size):
    torch.manual_seed(1)
    root = torch.randn(size, size).double()
    return root @ root.T + torch.eye(size), torch.randn(size).double()


def test_conjugate_gradients_against_a_direct_solve():
    """Exact after as many iterations as there are dimensions, or distinct eigenvalues."""
    matrix, b = positive_definite(8)
    x = torch.linalg.solve(matrix, b)
    torch.testing.assert_close(
        script.conjugate_gradient(matrix.mv, b, 8), x, rtol=1e-4, atol=1e-5
    )
    assert not torch.allclose(script.conjugate_gradient(matrix.mv, b, 3), x, rtol=1e-2)
    two = torch.tensor([2.0, 2, 2, 5, 5]).double()
    found = script.conjugate_gradient(lambda v: two * v, b[:5], 2)
    torch.testing.assert_close(found, b[:5] / two)


def test_each_iterate_is_best_in_its_krylov_space():
    """x of k iterations minimises x . A x / 2 - b . x over the span of b, A b, ..., A^(k-1) b."""
    matrix, b = positive_definite(6)
    for k in range(1, 5):
        basis = torch.stack([torch.linalg.matrix_power(matrix, i) @ b for i in range(k)], dim=1)
        basis, _ = torch.linalg.qr(basis)
        best = basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ b)
        found = script.conjugate_gradient(matrix.mv, b, k)
        torch.testing.assert_close(found, best, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found @ matrix @ found, found @ b)  # gives the step's length


def test_conjugate_gradients_stop_when_solved():
    calls = []

    def matvec(vector):
        calls.append(vector)
        return 3 * vector

    found = script.conjugate_gradient(matvec, torch.tensor([3.0, 6, 9]), 100)
    assert found.tolist() == pytest.approx([1, 2, 3]) and len(calls) == 1
    assert script.conjugate_gradient(matvec, torch.zeros(3), 100).tolist() == [0, 0, 0]
    assert len(calls) == 1


# ---- The step ------------------------------------------------------------------------------------


def moved(agent, batch, args):
    """The step that the policy took in the end, and the metrics."""
    before = script.flatten(script.policy_weights(agent)).detach()
    metrics = script.update_policy(agent, batch, args)
    return script.flatten(script.policy_weights(agent)).detach() - before, metrics


def test_the_step_is_the_natural_gradient_of_the_papers_length():
    """Against a direct solve. With two free scales: of the advantages, and their mean."""
    agent = small_agent(hidden=1)
    batch = make_batch(agent)
    matrix = fisher_matrix(agent, batch.obs) + 0.01 * torch.eye(10).double()
    gradient = policy_gradient(agent, batch)
    x = torch.linalg.solve(matrix, gradient)
    expected = x * (2 * 1e-4 / (x @ matrix @ x)).sqrt()
    args = script.Args(target_kl=1e-4, cg_iterations=40, cg_damping=0.01)
    batch = batch._replace(advantages=7 * batch.advantages + 3)
    found, metrics = moved(agent, batch, args)
    fraction = metrics["losses/step_fraction"].item()
    assert fraction in (1.0, pytest.approx(0.8))  # the true divergence may be a little larger
    torch.testing.assert_close(found, fraction * expected, rtol=1e-3, atol=1e-6)


def test_a_small_step_reaches_the_limit_of_the_divergence():
    """In second order it is the divergence; damping makes the step shorter."""
    for damping, low, high in ((0.0, 0.97, 1.03), (10.0, 0.0, 0.5)):
        agent = small_agent()
        batch = make_batch(agent, rows=500)
        args = script.Args(target_kl=1e-9, cg_damping=damping, cg_iterations=40)
        _, metrics = moved(agent, batch, args)
        whole = metrics["losses/kl"] / metrics["losses/step_fraction"] ** 2  # D is quadratic
        assert low < whole / 1e-9 < high
        assert metrics["losses/policy_loss"] < 0


def test_it_gains_what_it_says_within_the_limit():
    """As the networks are at first, in float32. What is logged is what came about."""
    agent = make_agent()
    agent.obs_statistics.update(3 * torch.randn(100, 3) + 1)
    batch = make_batch(agent, rows=300)
    with torch.no_grad():
        old = Independent(Normal(agent.actor(agent.normalize(batch.obs)), agent.log_std.exp()), 1)
        critic = script.flatten(agent.critic.parameters())
    _, metrics = moved(agent, batch, script.Args(target_kl=0.02))
    with torch.no_grad():
        new = Independent(Normal(agent.actor(agent.normalize(batch.obs)), agent.log_std.exp()), 1)
        divergence = kl_divergence(old, new).mean().item()
        ratio = (new.log_prob(batch.actions) - old.log_prob(batch.actions)).exp()
        gain = (ratio * batch.advantages).mean().item()
    assert 0.01 < divergence <= 0.02 and gain > 0
    assert metrics.pop("losses/kl").item() == pytest.approx(divergence, rel=1e-3)
    assert metrics.pop("losses/policy_loss").item() == pytest.approx(-gain, rel=1e-3)
    assert metrics.pop("losses/entropy").item() == pytest.approx(new.entropy().mean().item())
    assert 0 < metrics.pop("losses/step_fraction") <= 1 and not metrics
    assert script.flatten(agent.critic.parameters()).equal(critic)


def test_nothing_to_gain_leaves_the_policy_as_it_is():
    for advantage in (0.0, 1.0):
        agent = make_agent()
        batch = make_batch(agent)._replace(advantages=torch.full((50,), advantage))
        step, metrics = moved(agent, batch, script.Args())
        assert not step.any() and all(torch.isfinite(value) for value in metrics.values())
        assert metrics["losses/step_fraction"] == metrics["losses/policy_loss"] == 0


# ---- The line search -----------------------------------------------------------------------------


def search(factor, **settings):
    """Along the policy gradient, times a factor. What line_search returns, and where it went."""
    agent = small_agent()
    batch = make_batch(agent, rows=200)
    batch = batch._replace(advantages=batch.advantages + 1)  # only what is gained counts
    step = factor * policy_gradient(agent, batch)
    before = script.flatten(script.policy_weights(agent)).detach()
    found = script.line_search(agent, batch, step, script.Args(**settings))
    taken = script.flatten(script.policy_weights(agent)).detach() - before
    return found, taken, step


def test_a_good_step_is_taken_whole():
    (gain, divergence, fraction), taken, step = search(0.01)
    assert fraction == 1 and 0 < divergence < 0.01
    torch.testing.assert_close(taken, step)
    assert gain.item() == pytest.approx((step @ step).item() / 0.01, rel=0.05)  # in first order


def test_the_longest_step_within_the_limit_is_taken():
    """Each length by itself: the first that is short enough, and not the one before."""
    settings = {"line_search_shrink": 0.5, "target_kl": 0.001, "line_search_steps": 12}
    (_, divergence, fraction), taken, step = search(10.0, **settings)
    assert 0 < fraction < 1 and 0 < divergence <= 0.001
    torch.testing.assert_close(taken, fraction * step)
    (_, _, whole), _, _ = search(10.0 * 2 * fraction, **settings)
    assert whole == 0.5
    (_, _, whole), _, _ = search(10.0 * fraction, **settings)
    assert whole == 1.0


@pytest.mark.parametrize("factor, settings", [
    (1e3, {"line_search_steps": 3}),  # too far
    (-0.01, {}),  # down
    (math.nan, {}),
    (math.inf, {}),
])  # fmt: skip
def test_a_step_that_diverges_or_does_not_gain_is_refused(factor, settings):
    (gain, divergence, fraction), taken, _ = search(factor, **settings)
    assert gain == divergence == fraction == 0 and not taken.any()


# ---- learn, the loop -----------------------------------------------------------------------------


def test_update_fits_the_critic_alone():
    agent, reference = make_agent(), make_agent()
    obs, returns = torch.randn(20, 3), torch.randn(20)
    agent.obs_statistics.update(torch.tensor([[1.0, 10, 0], [3, 30, 0.2]]))  # 2 ± 1, 20 ± 10 ...
    normalised = (obs - torch.tensor([2, 20, 0.1])) / torch.tensor([1, 10, 0.1])
    batch = script.Batch(obs, torch.randn(20, 2), returns, returns, returns)
    for weights in agent.parameters():
        weights.grad = torch.ones_like(weights)  # one that is left over is no matter
    optimizer = torch.optim.SGD(agent.critic.parameters(), lr=0.1)
    metrics = script.update(agent, optimizer, batch, script.Args())
    loss = ((reference.critic(normalised.clamp(-10, 10)).squeeze(1) - returns) ** 2).mean() / 2
    assert metrics["losses/value_loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    torch.optim.SGD(reference.critic.parameters(), lr=0.1).step()
    for ours, theirs in zip(agent.parameters(), reference.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_every_epoch_fits_every_step_once(monkeypatch):
    seen = []

    def noting(agent, optimizer, batch, args):
        assert all(part.equal(batch.returns) for part in (batch.log_probs, batch.advantages))
        seen.append(batch.returns.tolist())
        return {"losses/value_loss": torch.tensor(float(len(seen)))}

    monkeypatch.setattr(script, "update", noting)
    monkeypatch.setattr(script, "update_policy", lambda *arguments: {"losses/kl": 0.5})
    rows = torch.arange(10.0)
    batch = script.Batch(rows, rows, rows, rows, rows)
    metrics = script.learn(None, None, batch, script.Args(num_minibatches=3, update_epochs=2))
    assert metrics == {"losses/kl": 0.5, "losses/value_loss": 3.5}
    assert [len(part) for part in seen] == [4, 3, 3] * 2
    first, second = sum(seen[:3], []), sum(seen[3:], [])
    assert sorted(first) == sorted(second) == rows.tolist() and first != second


FEW = dict(
    env_id="ContinuousDiary-v0", total_timesteps=300, num_envs=3, num_steps=20, num_minibatches=2,
    update_epochs=2, eval_episodes=7, learning_rate=1e-2, target_kl=0.3,
)  # fmt: skip


def test_a_batch_is_every_step_with_its_advantage(tmp_path, monkeypatch):
    """With pi_old and V_old of the agent that played: the first one is made from the seed."""
    rollouts = recorded(monkeypatch, script, "make_batch")
    learned = recorded(monkeypatch, script, "learn")
    flags = {"seed": 3, "gamma": 0.7, "gae_lambda": 0.6, "norm_obs": False}
    train(script, tmp_path, **FEW | flags)
    _, obs, actions, rewards, next_obs, terminated, truncated, _ = rollouts[0][0]
    torch.manual_seed(3)
    agent = script.Agent(2, np.float32([-2, 0]), np.float32([2, 10]), norm_obs=False)
    means, values = agent(obs)
    log_probs = Independent(Normal(means, agent.log_std.exp()), 1).log_prob(actions)
    ends = terminated, truncated
    advantages = script.gae(rewards, values, agent(next_obs)[1], *ends, 0.7, 0.6)
    columns = obs, actions, log_probs, advantages, advantages + values
    _, _, batch, _ = learned[0][0]
    for part, expected in zip(batch, columns, strict=True):
        torch.testing.assert_close(part, expected.detach().flatten(0, 1))
        assert not part.requires_grad


def test_rollouts_are_what_really_happened(tmp_path, monkeypatch):
    """What is learned from is the action that was sampled; the environment saw it in its bounds."""
    calls = recorded(monkeypatch, script, "make_batch")
    state, points = train(script, tmp_path, **FEW, norm_reward=False)
    assert len(calls) == 5 and state["envs"]["steps"] == 300
    low, high = np.array([-2, 0]), np.array([2, 10])
    for number, ((_, *rollout, _), _) in enumerate(calls):
        rollout[1] = (rollout[1].numpy().clip(-1, 1) + 1) / 2 * (high - low) + low
        for i in range(3):
            happened = Diary.made[i].steps[number * 20 : (number + 1) * 20]
            for column, expected in zip(rollout, zip(*happened), strict=True):
                expected = np.array(expected, np.float32)
                np.testing.assert_allclose(column[:, i], expected, rtol=1e-5, atol=1e-6)
    assert max(call[0][2].abs().max() for call in calls) > 1.5  # beyond the bounds
    check_episodes(points, side_by_side(3))


def test_all_metrics_are_logged_and_adam_has_the_critic_alone(tmp_path, monkeypatch):
    learned = recorded(monkeypatch, script, "learn")
    _, points = train(script, tmp_path, **FEW)
    for k, ((agent, optimizer, batch, _), metrics) in enumerate(learned):
        errors = batch.advantages.var() / batch.returns.var()  # V_old is returns - advantages
        for tag, value in (metrics | {"losses/explained_variance": 1 - errors}).items():
            assert points[tag][k] == (60 * (k + 1), pytest.approx(float(value), abs=1e-5)), tag
    assert type(optimizer) is torch.optim.Adam
    (group,) = optimizer.param_groups
    assert group["lr"] == 1e-2 and group["eps"] == 1e-5
    critic = script.flatten(agent.critic.parameters())
    assert script.flatten(group["params"]).equal(critic)


class Steady(Pays):
    action_space = Box(-1, 1, (1,), np.float32)


@pytest.mark.parametrize("truncates, low, high", [(True, 4.9, 5.1), (False, 1.7, 1.9)])
def test_a_time_limit_is_not_the_end_of_the_world(tmp_path, truncates, low, high):
    """Truncated for ever, a reward of 1 is worth 1 / (1 - 0.8) = 5.

    If every third step terminates, the three, which look alike, are worth 2.44, 1.8 and 1.
    """
    gym.register("Steady-v0", entry_point=Steady, kwargs={"truncates": truncates})
    flags = {"env_id": "Steady-v0", "gamma": 0.8, "gae_lambda": 0.9, "total_timesteps": 3000}
    flags |= {"update_epochs": 20, "num_minibatches": 1, "norm_obs": False, "norm_reward": False}
    state, _ = train(script, tmp_path, **FEW | flags)
    del gym.registry["Steady-v0"]
    agent = script.Agent(1, np.float32([-1]), np.float32([1]), norm_obs=False)
    agent.load_state_dict(state["network"])
    assert low < agent(torch.ones(1, 1))[1].item() < high


def test_statistics_change_only_between_updates_and_the_next_rollout(tmp_path, monkeypatch):
    check_ppo_statistics(script, tmp_path, monkeypatch, **FEW, norm_obs=True)


@pytest.mark.parametrize("norm_reward", [True, False])
def test_rewards_are_scaled_for_learning_only(tmp_path, monkeypatch, norm_reward):
    check_ppo_rewards(script, tmp_path, monkeypatch, **FEW, norm_reward=norm_reward, gamma=0.9)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch):
    spoilt = {"losses/value_loss": torch.tensor(math.nan)}
    monkeypatch.setattr(script, "learn", lambda *arguments: dict(spoilt))
    with pytest.raises(script.UsageError, match="not finite"):
        train(script, tmp_path, **FEW)


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 180} | settings)
        weights = state["network"].items()
        return [value.tolist() for name, value in weights if "statistics" not in name]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 190, "num_envs": 4, "learning_rate": 5e-3, "num_steps": 25,
        "gamma": 0.3, "gae_lambda": 0.2, "num_minibatches": 3, "update_epochs": 3,
        "target_kl": 0.1, "cg_iterations": 3, "cg_damping": 0.3, "line_search_steps": 1,
        "line_search_shrink": 0.5, "norm_obs": False, "norm_reward": False,
    })  # fmt: skip
