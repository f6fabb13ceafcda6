"""The mathematics of alphazero_tictactoe.py: against all games of tic-tac-toe, and against a search
that is written down once more, for one tree, as a recursion.
"""

import functools
import itertools
import math

import alphazero_tictactoe as script
import cases
import gymnasium as gym
import numpy as np
import pytest
import torch
from diary import check_settings, recorded, train

# For the tests that all scripts share.
TINY = (
    "--total-timesteps 1500 --num-envs 8 --num-simulations 6 --learning-starts 200 "
    "--buffer-size 500 --batch-size 32 --checkpoint-frequency 400 --eval-frequency 600 "
    "--eval-episodes 5"
)
OWN = "boards"
OWN_FLAGS = "--total-timesteps 3000 --learning-starts 500"
WRONG_SPACES = ["CartPole-v1", "Pendulum-v1"]
DIVERGES = "--learning-rate 1e30"
BAD = [
    ("--num-simulations 0", "--num-simulations"),
    ("--root-noise 1.1", "--root-noise"),
    ("--dirichlet-alpha 0", "--dirichlet-alpha"),
    ("--env-kwargs '{\"opponent\": \"weak\"}'", "--env-kwargs"),
    ("--total-timesteps 2000", "--learning-starts"),
]
LEARNS = [("--total-timesteps 20000 --seed 1", -0.5)]  # who moves at random loses most games
# What others published, by the record's name after `<script>__`: shown beside our results.
PUBLISHED = {}

# ---- The game ------------------------------------------------------------------------------------

ROWS = [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
WAYS = ROWS + list(zip(*ROWS)) + [(0, 4, 8), (2, 4, 6)]


def has_line(board, player):
    return any(all(board[square] == player for square in way) for way in WAYS)


@functools.cache
def positions():
    """All boards of games, seen by the player to move, with their outcome: 5478 of them."""
    found, to_do = {}, [(0,) * 9]
    while to_do:
        board = to_do.pop()
        if board not in found:
            found[board] = None
            if not has_line(board, -1):
                for square in (k for k in range(9) if board[k] == 0):
                    after = [-x for x in board]
                    after[square] = -1
                    to_do.append(tuple(after))
    return list(found)


def test_rules_on_every_board():
    game, boards = script.TicTacToe(), np.float32(positions())
    assert len(boards) == 5478  # as is known
    lost = game.has_lost(boards)
    assert lost.tolist() == [has_line(board, -1) for board in positions()]
    assert game.legal_actions(boards).tolist() == [[x == 0 for x in b] for b in positions()]
    for action in range(9):
        free = boards[:, action] == 0
        after = game.move(boards[free], np.full(free.sum(), action))
        expected = -boards[free]
        expected[:, action] = -1
        np.testing.assert_array_equal(after, expected)
    np.testing.assert_array_equal(boards, positions())  # they are not changed
    assert game.first_board().tolist() == [0] * 9


def test_outcome_of_best_play_is_what_is_known():
    """A draw; and wherever one may begin. In a corner, only the answer in the middle is good."""
    assert script.solve((0.0,) * 9) == 0
    for first in range(9):
        board = [0.0] * 9
        board[first] = -1.0
        assert script.solve(tuple(board)) == 0
    answers = []
    for square in range(1, 9):
        board = [1.0, *[0.0] * 8]
        board[square] = -1.0
        answers.append(script.solve(tuple(board)))
    assert answers == [1, 1, 1, 0, 1, 1, 1, 1]  # for the one in the corner, who is to move


def test_the_perfect_opponent_never_loses_and_takes_what_it_is_given():
    """Whatever one plays: all games, with each of its best answers."""
    ends = set()

    def play(env, board):
        for action in np.flatnonzero(board == 0):
            for choice in range(9):
                env.board = board.copy()
                env.np_random = Chooses(choice)
                after, reward, terminated, _, _ = env.step(action)
                if choice >= env.np_random.size:
                    break
                if terminated:
                    ends.add(reward)
                else:
                    play(env, after)

    for first in [np.zeros(9, np.float32), *-np.eye(9, dtype=np.float32)]:
        play(script.TicTacToe(), first)
    assert ends == {0.0, -1.0}


class Chooses:
    """A generator of random numbers that always takes the choice of this number."""

    def __init__(self, number):
        self.number, self.size = number, 1

    def choice(self, values):
        self.size = len(values)
        return values[min(self.number, self.size - 1)]


def test_a_game_by_hand_and_what_is_not_allowed():
    env = script.TicTacToe(opponent="random")
    env.reset(seed=0)
    env.board, env.np_random = np.zeros(9, np.float32), Chooses(0)  # it takes the first free square
    boards = []
    for action in (4, 1, 7):
        board, reward, terminated, truncated, _ = env.step(action)
        boards.append(board.tolist())
    assert boards == [
        [-1, 0, 0, 0, 1, 0, 0, 0, 0], [-1, 1, -1, 0, 1, 0, 0, 0, 0],
        [-1, 1, -1, 0, 1, 0, 0, 1, 0],
    ]  # fmt: skip
    assert (reward, terminated, truncated) == (1.0, True, False)
    np.testing.assert_array_equal(env.board, boards[-1])  # and is drawn so
    env.board = np.float32([-1, -1, 0, 1, 1, 0, 0, 0, 0])
    board, reward, terminated, *_ = env.step(8)  # and it completes its line
    assert (board[2], reward, terminated) == (-1, -1.0, True)
    env.board = np.float32([0, 0, 0, 0, -1, 0, 0, 0, 0])
    assert env.step(4)[1:3] == (-1.0, True)
    env.board = np.float32([1, -1, 1, 1, -1, -1, -1, 1, 0])
    assert env.step(8)[1:3] == (0.0, True)  # a draw
    env.board = np.float32([1, -1, 1, 1, -1, -1, -1, 0, 0])
    assert env.step(7)[1:3] == (0.0, True)  # and one that the opponent's move ends


def test_who_begins_is_drawn_and_the_picture_shows_the_board():
    env = script.TicTacToe(render_mode="rgb_array")
    stones = [int(env.reset(seed=seed)[0].sum()) for seed in range(400)]
    assert set(stones) == {0, -1} and np.mean(stones) == pytest.approx(-0.5, abs=0.1)
    env.board = np.float32([1, 0, 0, 0, -1, 0, 0, 0, 0])
    picture = env.render()
    assert picture.shape == (96, 96, 3)
    assert picture[16, 16].argmax() == 2 and picture[48, 48].argmax() == 0
    assert picture[80, 80].tolist() == [255] * 3


# ---- puct, Trees, search -------------------------------------------------------------------------


def agent_of(game=None, num_actions=9, board_size=9, scale=3.0):
    torch.manual_seed(0)
    agent = script.Agent(game or script.TicTacToe(), board_size, num_actions, 16)
    with torch.no_grad():
        for weights in agent.parameters():
            weights *= scale  # opinions of its own
    return agent


def test_the_actor_is_the_network_over_the_allowed_actions():
    agent, boards = agent_of(), np.float32(positions()[::50])
    legal = boards == 0
    for _ in range(2):
        priors, values = script.Actor(agent)(boards, legal)
        logits, expected = agent(torch.from_numpy(boards))
        np.testing.assert_allclose(values, expected.detach(), rtol=1e-4, atol=1e-6)
        logits[~torch.from_numpy(legal)] = -math.inf
        some = legal.any(1)
        np.testing.assert_allclose(
            priors[some], logits.softmax(1).detach().numpy()[some], rtol=1e-3, atol=1e-6
        )
        assert (priors[~some] == 0).all() and (~some).any()
        with torch.no_grad():
            for weights in agent.parameters():
                weights += 0.3 * torch.randn_like(weights)


def test_puct_by_hand():
    """N(s) is 1 + 3: each bonus is 1.5 * p * 2 / (1 + N)."""
    totals, visits = np.float32([[1.0, -1.0, 0.0, 0.0]]), np.array([[2, 1, 0, 0]])
    priors, legal = np.float32([[0.5, 0.2, 0.3, 0.0]]), np.array([[True, True, True, False]])
    found = script.puct(totals, visits, priors, legal, 1.5)
    np.testing.assert_allclose(found, [[0.5 + 0.5, -1 + 0.3, 0.9, -np.inf]], rtol=1e-6)


class Node:
    """The search once more: one tree, one node after the other."""

    def __init__(self, game, network, board):
        self.board, self.edges = board, {}
        legal = np.flatnonzero(game.legal_actions(board[None])[0])
        logits, value = network(torch.from_numpy(board)[None])
        probs = logits[0, legal].softmax(0).tolist()
        self.ended, self.value = len(legal) == 0, value.item()
        if game.has_lost(board[None])[0]:
            self.ended, self.value = True, -1.0
        elif self.ended:
            self.value = 0.0
        for action, prob in zip(legal.tolist(), probs):
            self.edges[action] = {"p": prob, "n": 0, "w": 0.0, "node": None}

    def visit(self, game, network, c_puct):
        """One simulation from here -> its value for the player to move here."""
        if self.ended:
            return self.value
        total = 1 + sum(edge["n"] for edge in self.edges.values())

        def score(action):
            edge = self.edges[action]
            mean = edge["w"] / edge["n"] if edge["n"] else 0.0
            return mean + c_puct * edge["p"] * math.sqrt(total) / (1 + edge["n"])

        action = max(self.edges, key=score)
        edge = self.edges[action]
        if edge["node"] is None:
            board = game.move(self.board[None], np.array([action]))[0]
            edge["node"] = Node(game, network, board)
            value = -edge["node"].value
        else:
            value = -edge["node"].visit(game, network, c_puct)
        edge["n"], edge["w"] = edge["n"] + 1, edge["w"] + value
        return value


@pytest.mark.parametrize("num_simulations, c_puct", [(1, 1.0), (20, 1.25), (60, 4.0), (200, 0.3)])
def test_search_is_that_of_the_recursion(num_simulations, c_puct):
    """For boards of all kinds at once: early and late ones, some of which end within the search."""
    agent, args = agent_of(), script.Args(num_simulations=num_simulations, c_puct=c_puct)
    boards = [b for b in positions() if not has_line(b, -1) and 0 in b]
    boards = np.float32(boards[:: len(boards) // 40])
    found, equal = script.search(agent, boards, args), 0
    for board, policy in zip(boards, found):
        root = Node(agent.game, agent, board)
        for _ in range(num_simulations):
            root.visit(agent.game, agent, c_puct)
        expected = np.zeros(9)
        for action, edge in root.edges.items():
            expected[action] = edge["n"] / num_simulations
        equal += np.allclose(policy, expected)
    assert equal >= len(boards) - 1  # rounding may turn one of two that are alike


def test_values_change_their_sign_with_the_player():
    """Two moves deep, where the network knows only that the second player wins."""
    agent = agent_of(cases.Nim(), 3, 1)
    actor = lambda boards, legal: (legal / np.maximum(legal.sum(1, keepdims=True), 1), 0 * boards[:, 0])
    trees = script.Trees(agent.game, actor, np.float32([[4.0]]), 300)
    for node in range(1, 301):
        trees.simulate(node, 1.0)
    q_values = trees.totals[0, 0] / trees.visits[0, 0]
    assert (q_values < -0.8).all()  # 4 are left: whatever one takes, the other takes the rest
    trees = script.Trees(agent.game, actor, np.float32([[5.0]]), 300)
    for node in range(1, 301):
        trees.simulate(node, 1.0)
    assert trees.visits[0, 0].argmax() == 0 and trees.totals[0, 0, 0] / trees.visits[0, 0, 0] > 0.7


@pytest.mark.parametrize("board, best", [
    ([1, 1, 0, -1, -1, 0, 0, 0, 0], 2), ([-1, -1, 0, 1, 0, 0, 0, 0, 1], 2),
    ([-1, 0, 0, 0, 1, 0, 0, 0, -1], None),
])  # fmt: skip
def test_search_wins_blocks_and_sees_a_fork(board, best):
    """Without an opinion on any board. Between two corners, a corner loses, a side does not."""
    agent = agent_of(scale=0.0)
    args = script.Args(num_simulations=800)
    policy = script.search(agent, np.float32([board]), args)[0]
    assert policy.sum() == pytest.approx(1)
    assert policy.argmax() == best if best is not None else policy.argmax() in (1, 3, 5, 7)


def test_noise_is_mixed_into_the_root_only():
    agent, boards = agent_of(), np.zeros((2, 9), np.float32)
    noise = np.eye(9, dtype=np.float32)[[3, 5]]
    args = script.Args(num_simulations=1, root_noise=1.0)
    assert script.search(agent, boards, args, noise).argmax(1).tolist() == [3, 5]
    args = script.Args(num_simulations=60, root_noise=0.25)
    plain, noisy = script.search(agent, boards, args), script.search(agent, boards, args, noise)
    assert (plain[0] == plain[1]).all() and (noisy != plain).any()
    trees = []

    class Noted(script.Trees):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            trees.append(self)

    script.Trees, kept = Noted, script.Trees
    try:
        script.search(agent, boards, args, noise)
    finally:
        script.Trees = kept
    (found,) = trees
    priors, _ = script.Actor(agent)(boards, boards == 0)
    np.testing.assert_allclose(found.priors[:, 0], 0.75 * priors + 0.25 * noise, rtol=1e-5)
    below, _ = script.Actor(agent)(found.boards[:, 1], found.legal[:, 1])
    np.testing.assert_allclose(found.priors[:, 1], below, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.3, 2.0])
def test_noise_is_dirichlet_over_the_allowed_actions(alpha):
    """Of k actions, each has the mean 1/k and the variance (k - 1) / (k^2 * (k * alpha + 1))."""
    torch.manual_seed(0)
    legal = np.array([[True, False, True, True, True]]).repeat(20_000, 0)
    noise = script.dirichlet_noise(legal, alpha)
    assert (noise[:, 1] == 0).all() and (noise >= 0).all()
    np.testing.assert_allclose(noise.sum(1), 1, rtol=1e-5)
    kept = noise[:, [0, 2, 3, 4]]
    np.testing.assert_allclose(kept.mean(0), 1 / 4, atol=0.01)
    np.testing.assert_allclose(kept.var(0), 3 / (16 * (4 * alpha + 1)), rtol=0.06)


def test_actions_are_drawn_from_pi_or_the_best():
    torch.manual_seed(0)
    policies = np.array([[0.5, 0.3, 0.2]]).repeat(40_000, 0)
    explore = np.arange(40_000) % 2 == 0
    actions = script.choose(policies, explore)
    assert (actions[~explore] == 0).all()
    shares = np.bincount(actions[explore], minlength=3) / 20_000
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.2], atol=0.015)


# ---- update --------------------------------------------------------------------------------------


def test_one_step_down_the_gradient_of_the_definition():
    agent = agent_of(scale=1.0)
    boards, policies = torch.randn(7, 9), torch.rand(7, 9)
    policies = policies / policies.sum(1, keepdim=True)
    batch = script.Batch(boards, policies, torch.tensor([1.0, -1, 0, 1, 1, -1, 0]))
    policy_loss, value_loss, entropy = 0, 0, 0
    logits, values = agent(boards)
    for row in range(7):
        log_p = (logits[row].exp() / logits[row].exp().sum()).log()
        policy_loss = policy_loss - (policies[row] * log_p).sum() / 7
        value_loss = value_loss + (values[row] - batch.outcomes[row]) ** 2 / 7
        entropy -= sum(p * math.log(p) for p in policies[row].tolist()) / 7
    gradients = torch.autograd.grad(policy_loss + value_loss, list(agent.parameters()))
    before = [weights.detach().clone() for weights in agent.parameters()]
    optimizer = torch.optim.SGD(agent.parameters(), lr=0.5)
    agent.layers[0].weight.grad = torch.ones(16, 9)  # what is left over is no matter
    metrics = script.update(agent, optimizer, batch, script.Args())
    for old, gradient, weights in zip(before, gradients, agent.parameters(), strict=True):
        torch.testing.assert_close(weights.detach(), old - 0.5 * gradient, rtol=1e-4, atol=1e-5)
    found = {tag: value.item() for tag, value in metrics.items()}
    expected = {"losses/policy_loss": policy_loss.item(), "losses/value_loss": value_loss.item()}
    assert found == pytest.approx(expected | {"losses/entropy": entropy}, rel=1e-4)
    assert not any(value.requires_grad for value in metrics.values())


def test_weight_decay_is_that_of_the_loss(tmp_path, monkeypatch):
    """c * |theta|^2 has the gradient 2 * c * theta, which Adam adds to the other."""
    updates = recorded(monkeypatch, script, "update")
    train(script, tmp_path, **FEW | {"weight_decay": 0.3, "anneal_lr": False})
    (group,) = updates[0][0][1].param_groups
    assert type(updates[0][0][1]) is torch.optim.Adam
    assert (group["weight_decay"], group["lr"]) == (0.6, 1e-2)


# ---- SelfPlay, ReplayBuffer ----------------------------------------------------------------------


@pytest.mark.parametrize("length, won, expected", [
    (1, True, [1]), (4, True, [-1, 1, -1, 1]), (5, True, [1, -1, 1, -1, 1]), (3, False, [0, 0, 0]),
])  # fmt: skip
def test_who_moved_last_has_won(length, won, expected):
    assert script.outcomes(length, won).tolist() == expected


def policies_of(*numbers):
    """pi that says in its first number which one it is."""
    policies = np.zeros((len(numbers), 9))
    policies[:, 0] = numbers
    return policies


def test_two_games_by_hand():
    """One is won by the first player in five moves, and a new one begins; the other is a draw."""
    games = script.SelfPlay(script.TicTacToe(), 2)
    first, second = [0, 3, 1, 4, 2, 8, 7, 6, 5], [0, 1, 2, 4, 3, 5, 7, 6, 8]
    assert games.boards.tolist() == [[0] * 9] * 2
    seen, ended = [], []
    for t, actions in enumerate(zip(first, second)):
        assert games.lengths().tolist() == [t if t < 5 else t - 5, t]
        seen.append(games.boards.copy())
        ended.append(games.step(policies_of(t, t + 0.5), np.array(actions)))
    assert [len(finished) for finished in ended] == [0, 0, 0, 0, 1, 0, 0, 0, 1]
    ((number, boards, policies, outcomes),) = ended[4]
    assert number == 0
    assert outcomes.tolist() == [1, -1, 1, -1, 1]
    assert policies[:, 0].tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(boards, [board[0] for board in seen[:5]])
    assert boards[4].tolist() == [1, 1, 0, -1, -1, 0, 0, 0, 0]
    assert boards[3].tolist() == [-1, -1, 0, 1, 0, 0, 0, 0, 0]
    ((number, boards, policies, outcomes),) = ended[8]
    assert number == 1
    assert outcomes.tolist() == [0] * 9
    assert policies[:, 0].tolist() == [t + 0.5 for t in range(9)]
    assert games.boards.tolist()[1] == [0] * 9 and games.lengths().tolist() == [4, 0]


@pytest.mark.parametrize("moves", [0, 3, 6])
def test_running_games_come_back_from_a_checkpoint(tmp_path, moves):
    order = [4, 0, 8, 2, 1, 7, 6]
    games = [script.SelfPlay(script.TicTacToe(), 2) for _ in range(2)]
    for t in range(moves):
        games[0].step(policies_of(t, t), np.array([order[t], order[t]]))
    torch.save(games[0].state_dict(), tmp_path / "games.pt")
    games[1].load_state_dict(torch.load(tmp_path / "games.pt", weights_only=True))
    results = []
    for game in games:
        for t in range(moves, 7):
            finished = game.step(policies_of(t, t), np.array([order[t], order[t]]))
        results.append((game.boards.tolist(), [[p.tolist() for p in g[1:]] for g in finished]))
    assert results[0] == results[1]
    with pytest.raises(ValueError, match="there were 2 games, 3 now"):
        script.SelfPlay(script.TicTacToe(), 3).load_state_dict(games[0].state_dict())


@pytest.mark.parametrize("size, count", [(7, 5), (7, 20)])
def test_buffer_holds_the_last_positions_and_comes_back(tmp_path, size, count):
    torch.manual_seed(0)
    buffers = [script.ReplayBuffer(size, 9, 9) for _ in range(2)]
    for first in range(1, count + 1, 3):
        n = np.arange(first, min(first + 3, count + 1), dtype=np.float32)
        buffers[0].add(np.tile(n[:, None], 9), np.tile(n[:, None] / 2, 9), -n)
    torch.save(buffers[0].state_dict(), tmp_path / "buffer.pt")
    buffers[1].load_state_dict(torch.load(tmp_path / "buffer.pt", weights_only=True))
    for buffer in buffers:
        assert buffer.num_added == count
        batch = buffer.sample(5000)
        n = batch.boards[:, 0]
        assert torch.equal(batch.policies[:, 3], n / 2) and torch.equal(batch.outcomes, -n)
        numbers, counts = np.unique(n, return_counts=True)
        assert numbers.tolist() == list(range(max(1, count - size + 1), count + 1))
        np.testing.assert_allclose(counts / 5000, 1 / len(numbers), atol=0.03)


# ---- The loop ------------------------------------------------------------------------------------

FEW = dict(
    total_timesteps=400, num_envs=4, num_simulations=5, learning_starts=60, batch_size=16,
    buffer_size=1000, hidden_size=16, train_frequency=8, eval_episodes=3, learning_rate=1e-2,
)  # fmt: skip


@pytest.mark.parametrize("explore_moves", [0, 3])
def test_the_loop(tmp_path, monkeypatch, explore_moves):
    """What is searched, played and learned; every position of a game that ended is in the buffer."""
    searches, updates, choices = (
        recorded(monkeypatch, script, name) for name in ("search", "update", "choose")
    )
    settings = {"explore_moves": explore_moves, "root_noise": 0.5}
    state, points = train(script, tmp_path, **FEW | settings)
    boards, kept, lengths, returns = np.zeros((4, 9), np.float32), [], [], []
    running, game = [[] for _ in range(4)], script.TicTacToe()
    for k in range(100):
        (_, seen, _, noise), policies = searches[k]
        (pi, explore), actions = choices[k]
        np.testing.assert_array_equal(seen, boards)
        assert (noise[boards != 0] == 0).all() and (noise.sum(1) > 0.99).all()
        assert explore.tolist() == [len(moves) < explore_moves for moves in running]
        assert np.array_equal(pi, policies)
        boards = game.move(boards, actions)
        for i, moves in enumerate(running):
            moves.append((seen[i].tolist(), policies[i].tolist()))
            won = has_line(boards[i], -1)
            if won or (boards[i] != 0).all():
                for t, (board, policy) in enumerate(moves):
                    z = 0 if not won else 1 if (len(moves) - t) % 2 == 1 else -1
                    kept.append((board, policy, z))
                returns.append((4 * k + i + 1, kept[-len(moves)][2]))
                lengths.append(len(moves))
                running[i], boards[i] = [], 0
    assert state["buffer"]["num_added"] == len(kept) > 100
    for column, expected in zip(state["buffer"]["rows"], zip(*kept), strict=True):
        np.testing.assert_allclose(column, np.array(expected), rtol=1e-6)
    assert points["charts/episodic_return"] == returns
    assert [length for _, length in points["charts/episodic_length"]] == lengths
    assert state["envs"]["steps"] == 400
    # Updates are due at the steps that 8 divides, from 60 on, at a rate that falls.
    rates = [optimizer.param_groups[0]["lr"] for (_, optimizer, _, _), _ in updates]
    due = [step for step in range(64, 401, 8)]
    np.testing.assert_allclose(rates, [1e-2 * (1 - (step - 4) / 400) for step in due])
    assert {len(batch.boards) for (_, _, batch, _), _ in updates} == {16}
    assert all(len(arguments) == 3 for arguments, _ in searches[100:]) and len(searches) > 100


def test_the_most_visited_action_is_played_in_evaluation():
    agent, args = agent_of(), script.Args(num_simulations=50)
    boards = np.float32([b for b in positions() if 0 in b and not has_line(b, -1)][:50])
    found = script.play(args, agent, boards)
    assert found.tolist() == script.search(agent, boards, args).argmax(1).tolist()
    assert (boards[np.arange(50), found] == 0).all()


@pytest.mark.parametrize("missing", ["first_board", "legal_actions", "move", "has_lost"])
def test_a_game_needs_its_rules(missing):
    names = {"first_board", "legal_actions", "move", "has_lost"} - {missing}
    space = {"observation_space": cases.Nim.observation_space, "action_space": gym.spaces.Discrete(3)}
    kind = type("Game", (gym.Env,), space | {name: getattr(cases.Nim, name) for name in names})
    gym.register("HalfAGame-v0", entry_point=kind)
    with pytest.raises(script.UsageError, match=f"needs a game.*{missing}.*HalfAGame-v0"):
        script.make_env(script.Args(env_id="HalfAGame-v0"))
    del gym.registry["HalfAGame-v0"]


def test_every_setting_of_the_algorithm_changes_the_outcome(tmp_path):
    def outcome(**settings):
        state, _ = train(script, tmp_path, **FEW | {"total_timesteps": 160} | settings)
        return [weights.tolist() for weights in state["network"].values()]

    check_settings(script, outcome, {
        "seed": 2, "total_timesteps": 168, "num_envs": 5, "learning_rate": 5e-3, "anneal_lr": False,
        "weight_decay": 0.1, "num_simulations": 6, "c_puct": 3.0, "root_noise": 0.9,
        "dirichlet_alpha": 0.1, "explore_moves": 0, "buffer_size": 30, "batch_size": 15,
        "learning_starts": 100, "train_frequency": 5, "gradient_steps": 2, "hidden_size": 15,
    })  # fmt: skip


def test_all_numbers_of_a_search_are_legal_in_every_game():
    """Played to its end with the actions of a search of one simulation."""
    for moves in itertools.islice(itertools.permutations(range(9)), 0, 300, 7):
        board = np.zeros((1, 9), np.float32)
        agent, game = agent_of(), script.TicTacToe()
        for move in moves:
            if game.has_lost(board)[0]:
                break
            policy = script.search(agent, board, script.Args(num_simulations=1))[0]
            assert (policy > 0).sum() == 1 and board[0, policy.argmax()] == 0
            board = game.move(board, np.array([move]))
