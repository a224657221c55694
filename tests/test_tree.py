"""Who sees whom, by brute force; the caches, the sampler, the head in chunks."""

import random

import pytest
import tiny
import torch

import tree
from system.family import use_tree_attention
from tree import (
    LeafCache,
    RowCache,
    TrunkAndLeaves,
    attention_and_norm,
    attention_and_norm_plain,
    chunked_head,
    kv_bytes,
    sample,
    sees,
)

HEADS, KV_HEADS, WIDTH, SCALING = 4, 2, 8, 0.3
WINDOWS = [None, 1, 3, 6, 100]
ALL_FAMILIES = [*tiny.FAMILIES, *tiny.OTHER_FAMILIES]


# ------------------------------------------------------------------------------ who sees whom


def random_tree(rng: random.Random, trunks: int):
    """A packed row, and the path of each token: the row indices of its ordinary sequence."""
    row = TrunkAndLeaves()
    paths = []
    for _ in range(trunks):
        length = rng.randint(2, 12)
        first = row.add_trunk([0] * length)
        trunk = list(range(first, first + length))
        paths += [trunk[: i + 1] for i in range(length)]
        for _ in range(rng.randint(0, 3)):
            leaves = []
            for _ in range(rng.randint(1, 3)):
                leaves.append((rng.randint(1, length), [0] * rng.randint(1, 5)))
            for start, (branch, ids) in zip(row.add_leaves(leaves), leaves):
                path = trunk[:branch]
                for i in range(len(ids)):
                    path = [*path, start + i]
                    paths.append(path)
    return row, paths


def seen_on_paths(paths: list[list[int]], window: int | None) -> torch.Tensor:
    """The definition: a token sees its path, or the last `window` tokens of it. [T, T]"""
    mask = torch.zeros(len(paths), len(paths), dtype=torch.bool)
    for query, path in enumerate(paths):
        seen = path if window is None else path[-window:]
        mask[query, seen] = True
    return mask


def dense_attention(query, key, value, mask=None):
    """Masked softmax, written out. query [H, T, D], key and value [H_kv, L, D], mask [T, L]."""
    group = query.shape[0] // key.shape[0]
    scores = query @ key.repeat_interleave(group, 0).transpose(1, 2) * SCALING
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ value.repeat_interleave(group, 0)


def random_projections(rows: int, tokens: int, dtype=torch.float64):
    """Query, key and value of `tokens` tokens in each row."""
    query = torch.randn(rows, HEADS, tokens, WIDTH, dtype=dtype)
    key = torch.randn(rows, KV_HEADS, tokens, WIDTH, dtype=dtype)
    value = torch.randn(rows, KV_HEADS, tokens, WIDTH, dtype=dtype)
    return query, key, value


@pytest.mark.parametrize("window", WINDOWS)
def test_sees_is_the_path_of_each_token(window):
    rng = random.Random(f"sees {window}")
    for _ in range(300):
        row, paths = random_tree(rng, trunks=1)
        position, leaf, branch = map(torch.tensor, (row.position, row.leaf, row.branch))
        token = torch.arange(len(paths))
        found = sees(position, leaf, branch, token[:, None], token[None, :], window)
        assert torch.equal(found, seen_on_paths(paths, window))
        assert row.position == [len(path) - 1 for path in paths]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_masks_of_the_pieces_are_the_paths(window):
    """Trunks do not see one another, and what a piece's mask leaves out is seen by nobody."""
    rng = random.Random(f"masks {window}")
    for _ in range(100):
        row, paths = random_tree(rng, trunks=rng.randint(1, 3))
        found = torch.zeros(len(paths), len(paths), dtype=torch.bool)
        starts = [sum(row.sizes[:piece]) for piece in range(len(row.sizes))]
        for piece, (trunk, prefix) in enumerate(zip(row.trunks, row.prefixes)):
            query = torch.arange(starts[piece], starts[piece] + row.sizes[piece])
            before = torch.arange(starts[trunk], starts[trunk] + prefix)
            mask = row.mask(piece, window, torch.zeros(1), group=2)
            found[query[:, None], torch.cat([before, query])] = mask == 0
        assert torch.equal(found, seen_on_paths(paths, window))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_packed_row_attends_along_the_paths(window):
    torch.manual_seed(0)
    rng = random.Random(f"row {window}")
    for _ in range(30):
        row, paths = random_tree(rng, trunks=rng.randint(1, 3))
        query, key, value = random_projections(1, len(paths))
        found = row.attend(0, query, key, value, SCALING, window)
        mask = seen_on_paths(paths, window)
        expected = dense_attention(query[0], key[0], value[0], mask)
        torch.testing.assert_close(found[0], expected)


def test_layers_with_other_windows_do_not_share_masks():
    torch.manual_seed(0)
    row, paths = random_tree(random.Random(5), trunks=2)
    query, key, value = random_projections(1, len(paths))
    for layer, window in enumerate([None, 3, None, 2, 3]):
        found = row.attend(layer, query, key, value, SCALING, window)
        mask = seen_on_paths(paths, window)
        torch.testing.assert_close(found[0], dense_attention(query[0], key[0], value[0], mask))


def test_a_prefill_keeps_keys_and_values():
    row = TrunkAndLeaves()
    row.add_trunk([1, 2, 3])
    query, key, value = random_projections(1, 3)
    row.attend(0, query, key, value, SCALING, None)
    assert row.kept is None
    row.kept = {}
    row.attend(1, query, key, value, SCALING, None)
    assert list(row.kept) == [1]
    assert torch.equal(row.kept[1][0], key)
    assert torch.equal(row.kept[1][1], value)


# ----------------------------------------------------------------------------- practice: LeafCache


class Leaves:
    """Practice on random trunks beside its definition: the keys and values of each leaf's path."""

    def __init__(self, rng: random.Random, windows: list[int | None]):
        self.windows = windows
        self.layers = range(len(windows))
        lengths = [rng.randint(1, 12) for _ in range(rng.randint(1, 4))]
        trunks = {layer: [] for layer in self.layers}
        for layer in self.layers:
            for length in lengths:
                _, key, value = random_projections(1, length)
                trunks[layer].append((key[0], value[0]))
        # Some trunks have no leaves.
        owner, prefix = [], []
        for trunk, length in enumerate(lengths):
            count = rng.randint(0 if owner else 1, 4)
            owner += [trunk] * count
            prefix += [rng.randint(1, length) for _ in range(count)]
        # [row][layer] -> keys, values of the path.
        self.paths = []
        for trunk, seen in zip(owner, prefix):
            of_row = []
            for layer in self.layers:
                keys, values = trunks[layer][trunk]
                of_row.append((keys[:, :seen], values[:, :seen]))
            self.paths.append(of_row)
        self.cache = LeafCache(trunks, torch.tensor(owner), torch.tensor(prefix))

    def read_a_token(self):
        for layer in self.layers:
            query, key, value = random_projections(len(self.paths), 1)
            window = self.windows[layer]
            found = self.cache.attend(layer, query, key, value, SCALING, window)
            for row, of_row in enumerate(self.paths):
                keys = torch.cat([of_row[layer][0], key[row]], 1)
                values = torch.cat([of_row[layer][1], value[row]], 1)
                of_row[layer] = (keys, values)
                if window:
                    keys, values = keys[:, -window:], values[:, -window:]
                expected = dense_attention(query[row], keys, values)
                torch.testing.assert_close(found[row], expected, atol=1e-6, rtol=1e-6)
        self.cache.advance()

    def keep(self, rows: list[int]):
        self.cache.keep(torch.tensor(rows))
        self.paths = [self.paths[row] for row in rows]


@pytest.mark.parametrize("windows", [[None], [1], [3, None], [2, 6, 2], [100]])
def test_leaves_attend_along_their_paths(windows):
    """Token by token, while leaves end; a window moves past the branch and over the leaf."""
    torch.manual_seed(0)
    rng = random.Random(f"leaves {windows}")
    for _ in range(25):
        leaves = Leaves(rng, windows)
        for _ in range(7):
            leaves.read_a_token()
            if rng.random() < 0.4:
                count = len(leaves.paths)
                leaves.keep(sorted(rng.sample(range(count), rng.randint(1, count))))


def test_trunks_without_leaves_leave_the_cache():
    torch.manual_seed(0)
    trunks = {0: []}
    for length in (5, 9, 3):
        _, key, value = random_projections(1, length)
        trunks[0].append((key[0], value[0]))
    cache = LeafCache(trunks, torch.tensor([0, 0, 1, 2]), torch.tensor([4, 5, 9, 1]))
    assert trunks == {}
    assert cache.trunks[0][0].shape[:1] + cache.limit.shape == (3, 3, 2)
    cache.attend(0, *random_projections(4, 1), SCALING, None)
    cache.advance()
    cache.keep(torch.tensor([1, 3]))
    assert cache.trunks[0][0].shape[:1] + cache.limit.shape == (2, 2, 1)
    assert cache.longest == 5
    assert cache.leaves[0][0].shape[0] == 2


# ------------------------------------------------------------------------------ episodes: RowCache


class Rows:
    """Episodes' rows beside their definition: the keys and values of all that a row has read."""

    def __init__(self, count: int, window: int | None):
        self.window = window
        self.cache = RowCache(count, "cpu")
        self.read = [self.nothing() for _ in range(count)]

    @staticmethod
    def nothing():
        _, key, value = random_projections(1, 0)
        return key[0], value[0]

    def read_tokens(self, rows: list[int] | None, counts: list[int]):
        """Row rows[i], ascending, reads counts[i] tokens; shorter ones are padded."""
        width = max(counts)
        positions = self.cache.begin(width, rows)
        query, key, value = random_projections(len(counts), width)
        found = self.cache.attend(0, query, key, value, SCALING, self.window)
        for i, row in enumerate(range(len(counts)) if rows is None else rows):
            count = counts[i]
            old_keys, old_values = self.read[row]
            start = old_keys.shape[1]
            keys = torch.cat([old_keys, key[i, :, :count]], 1)
            values = torch.cat([old_values, value[i, :, :count]], 1)
            self.read[row] = (keys, values)
            position = torch.arange(start, start + count)
            assert torch.equal(positions[i, :count], position)
            seen = torch.arange(start + count) <= position[:, None]
            if self.window:
                seen &= torch.arange(start + count) > position[:, None] - self.window
            expected = dense_attention(query[i, :, :count], keys, values, seen)
            torch.testing.assert_close(found[i, :, :count], expected)
            self.cache.lengths[row] += count

    def begin_anew(self, row: int):
        self.read[row] = self.nothing()
        self.cache.lengths[row] = 0

    def keep(self, rows: list[int]):
        self.cache.keep(rows)
        self.read = [self.read[row] for row in rows]


@pytest.mark.parametrize("window", [None, 1, 5, 300])
def test_rows_attend_over_all_that_they_have_read(window):
    """Rows of unlike length read together or apart, begin anew, and leave."""
    torch.manual_seed(0)
    rng = random.Random(f"rows {window}")
    for _ in range(8):
        rows = Rows(rng.randint(2, 6), window)
        for _ in range(12):
            count = len(rows.read)
            some = sorted(rng.sample(range(count), rng.randint(1, count)))
            rows.read_tokens(some, [rng.randint(1, 40) for _ in some])
            rows.read_tokens(None, [1] * count)
            if rng.random() < 0.3:
                rows.begin_anew(rng.randrange(count))
            if rng.random() < 0.2:
                rows.keep(sorted(rng.sample(range(count), max(1, count - 1))))


def test_rows_that_all_begin_need_no_mask():
    """Unless a window is shorter than what they read."""
    for window, masks in ((None, []), (5, []), (4, [4])):
        rows = Rows(3, window)
        rows.read_tokens(None, [5, 2, 3])
        assert list(rows.cache.masks) == masks
        rows.read_tokens(None, [1, 1, 1])
        assert list(rows.cache.masks) == [window]


@pytest.mark.parametrize("queries", [1, 4, 9])
def test_episodes_attend_in_bfloat16_as_in_float(queries):
    torch.manual_seed(0)
    cache, lengths = RowCache(3, "cpu"), [40, 17, 30]
    old = random_projections(3, 40, torch.bfloat16)
    new = random_projections(3, queries, torch.bfloat16)
    cache.begin(40)
    cache.attend(0, *old, SCALING, None)
    cache.lengths = lengths
    cache.begin(queries)
    found = cache.attend(0, *new, SCALING, None)
    for row, length in enumerate(lengths):
        keys = torch.cat([old[1][row, :, :length], new[1][row]], 1).float()
        values = torch.cat([old[2][row, :, :length], new[2][row]], 1).float()
        seen = torch.arange(length + queries) <= length + torch.arange(queries)[:, None]
        expected = dense_attention(new[0][row].float(), keys, values, seen)
        torch.testing.assert_close(found[row].float(), expected, atol=0.02, rtol=0.02)


# --------------------------------------------------------------------------- attention and sampling


@pytest.mark.parametrize("rows, tokens, length", [(1, 9, 35), (3, 6, 16), (3, 1, 20)])
def test_query_heads_folded_into_the_length_attend_as_before(monkeypatch, rows, tokens, length):
    """As on CUDA; values and gradients."""
    torch.manual_seed(0)
    query, _, _ = random_projections(rows, tokens)
    _, key, value = random_projections(rows, length)
    projections = [query, key, value]
    for part in projections:
        part.requires_grad_()
    seen = torch.rand(rows, 1, tokens, length) < 0.5
    seen[..., 0] = True
    found = []
    for folded in (False, True):
        monkeypatch.setattr(tree, "folds", lambda query, folded=folded: folded)
        mask = tree.additive(seen, query, HEADS // KV_HEADS)
        # The rows of a mask begin at multiples of 16 numbers.
        assert mask.shape[2] == (tokens if tokens == 1 or not folded else 2 * tokens)
        assert mask.stride(2) % 16 == 0
        out = tree.attention(query, key, value, SCALING, mask)
        gradients = torch.autograd.grad((out * torch.arange(WIDTH)).sum(), projections)
        found.append([out, *gradients])
    for plain, folded in zip(*found):
        torch.testing.assert_close(folded, plain)
    for row in range(rows):
        expected = dense_attention(query[row], key[row], value[row], seen[row])
        torch.testing.assert_close(found[0][0][row], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_efficient_kernel_of_cuda_is_called_as_it_wants(dtype):
    """On tensors without storage: it takes the mask, and gives a normaliser for each query."""
    query, key = (torch.empty(3, 2, count, 16, dtype=dtype, device="meta") for count in (5, 70))
    mask = tree.additive(torch.ones(3, 1, 5, 70, dtype=torch.bool, device="meta"), query)
    for part in (mask, None):
        out, norm = tree.efficient_attention(query, key, key, 0.25, part)
        assert (out.shape, out.dtype) == (query.shape, dtype)
        assert (norm.shape, norm.dtype) == (query.shape[:3], torch.float32)


TOLERANCES = [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 0.03)]


@pytest.mark.parametrize("dtype, tolerance", TOLERANCES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_kernel_of_cpus_gives_what_the_plain_form_gives(dtype, tolerance, masked):
    """Attention and log-normalisers, also where a mask hides everything from one query."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, count, 16, dtype=dtype) for count in (5, 70, 70))
    mask, answered = None, torch.ones(3, 2, 5, dtype=torch.bool)
    if masked:
        hidden = torch.rand(3, 1, 5, 70) < 0.5
        hidden[1, 0, 2] = True
        mask = torch.zeros(3, 1, 5, 70, dtype=dtype).masked_fill(hidden, -1e30)
        answered = ~hidden.all(-1).expand(3, 2, 5)
    found = attention_and_norm(query, key, value, 0.25, mask)
    wide = [part if part is None else part.double() for part in (query, key, value, mask)]
    expected = attention_and_norm_plain(*wide[:3], 0.25, wide[3])
    for ours, plain in zip(found, expected):
        assert not ours.isnan().any()
        assert (ours.double() - plain)[answered].abs().max() < tolerance


def test_the_plain_form_is_softmax_and_its_normaliser():
    query = torch.tensor([[[[2.0]]]])
    key = torch.tensor([[[[1.0], [0.0], [5.0]]]])
    value = torch.tensor([[[[10.0], [20.0], [30.0]]]])
    mask = torch.tensor([[[[0.0, 0.0, -1e30]]]])
    out, norm = attention_and_norm_plain(query, key, value, 0.5, mask)
    # Scores 1 and 0: weights e / (e + 1) = 0.7310586 and 0.2689414; ln(e + 1) = 1.3132617.
    assert out.item() == pytest.approx(12.689414)
    assert norm.item() == pytest.approx(1.3132617)


def uniform(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_sample_inverts_the_distribution_function():
    logits = torch.tensor([0.2, 0.3, 0.5]).log().expand(6, 3)
    noise = uniform(0.0, 0.19, 0.21, 0.49, 0.51, 1 - 1e-16)
    assert sample(logits, torch.ones(6), noise).tolist() == [0, 0, 1, 1, 2, 2]
    # Temperature 0 does not look at the random number.
    assert sample(logits, torch.zeros(6), noise).tolist() == [2] * 6
    assert sample(logits[:2], torch.tensor([1.0, 0.0]), noise[:2]).tolist() == [0, 2]
    # Temperature 1/2 squares the odds: 4, 9, 25 of 38.
    noise = uniform(3.9, 4.1, 12.9, 13.1) / 38
    assert sample(logits[:4], torch.full((4,), 0.5), noise).tolist() == [0, 1, 1, 2]


@pytest.mark.parametrize("size", [3, 127, 1000, 8192])
def test_sampling_inverts_the_whole_distribution_function(size):
    """At every token's borders and between; rounding may move a border by 1e-6."""
    generator = torch.Generator().manual_seed(size)
    logits = 3 * torch.randn(7, size, generator=generator)
    temperature = torch.tensor([0.3, 0.5, 1.0, 1.0, 1.0, 2.0, 9.0])
    upper = torch.softmax(logits.double() / temperature[:, None], -1).cumsum(-1)
    lower = torch.cat([torch.zeros(7, 1), upper[:, :-1]], 1)
    for token in {*range(0, size, 97), size - 1}:
        low, high = lower[:, token], upper[:, token]
        wide = high - low > 4e-6
        for noise in (low + 1e-6, (low + high) / 2, high - 1e-6):
            drawn = sample(logits, temperature, noise.clamp(max=1 - 1e-16))
            assert (drawn[wide] == token).all()
    many = torch.rand(500, 7, dtype=torch.float64, generator=generator)
    drawn = torch.stack([sample(logits, temperature, noise) for noise in many], 1)
    assert (upper.gather(1, drawn) + 1e-6 > many.T).all()
    assert (lower.gather(1, drawn) - 1e-6 < many.T).all()
    # A row alone draws the same.
    alone = [sample(logits[2:3], temperature[2:3], noise[2:3]) for noise in many[:50]]
    assert torch.equal(drawn[2, :50], torch.cat(alone))


def test_impossible_tokens_are_never_sampled():
    never = -torch.inf
    logits = torch.tensor([never, 0.0, never, 0.0, never]).expand(3, 5)
    # 1 - 1e-16 is 1: rounding may reach past the last possible token.
    noise = uniform(0.0, 0.5, 1 - 1e-16)
    assert sample(logits, torch.ones(3), noise).tolist() == [1, 3, 3]


def test_long_stretches_of_impossible_tokens_are_never_sampled():
    """At the border between two stretches, and near 1, where rounding matters."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.full((50, 1000), -torch.inf)
    logits[:, 260:300] = torch.randn(50, 40, generator=generator)
    logits[:, 390:400] = torch.randn(50, 10, generator=generator)
    weights = logits.softmax(-1).double()
    border = (weights[:, :300].sum(-1) / weights.sum(-1))[:, None]
    around = border + torch.linspace(-2e-7, 2e-7, 400, dtype=torch.float64)
    near_one = 1 - torch.logspace(-16, -6, 200, dtype=torch.float64)
    noise = torch.cat([around, near_one.expand(50, -1)], 1)
    drawn = torch.stack([sample(logits, torch.ones(50), column) for column in noise.T], 1)
    assert (weights.gather(1, drawn) > 0).all()


def test_sampling_from_nan_gives_a_token_id():
    """The run then stops by its loss, not by an index."""
    logits = torch.full((2, 5), torch.nan)
    drawn = sample(logits, torch.tensor([1.0, 0.0]), uniform(0.3, 0.3))
    assert ((drawn >= 0) & (drawn < 5)).all()


# --------------------------------------------------------------------------------- the model's side


@pytest.mark.parametrize("most, times", [(0, 2), (10**9, 1)])
def test_the_head_in_chunks_is_the_head_at_once(most, times):
    """Too many logits are not kept for the backward pass, but computed again."""
    model = tiny.model()
    torch.manual_seed(0)
    hidden = torch.randn(30, 32, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(97, (30,))
    calls = []
    model.lm_head.register_forward_hook(lambda _, args, out: calls.append(len(out)))

    def results(**chunks):
        logps, entropies = chunked_head(model, hidden, targets, True, **chunks)
        loss = (logps * entropies).sum()
        return logps, entropies, *torch.autograd.grad(loss, [hidden, model.lm_head.weight])

    at_once = results()
    assert calls == [30]
    calls.clear()
    in_chunks = results(rows=7, most=most)
    assert calls[:5] == [7, 7, 7, 7, 2]
    assert sum(calls) == times * 30
    for found, expected in zip(in_chunks, at_once):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert chunked_head(model, hidden, targets, False)[1] is None


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_kv_bytes_are_what_a_prefill_keeps(family):
    model = tiny.model(family)
    use_tree_attention(model)
    row = TrunkAndLeaves()
    row.add_trunk(list(range(10)))
    row.kept = {}
    with torch.no_grad():
        tree.forward(model, *row.tensors("cpu"), row)
    size = 0
    for keys, values in row.kept.values():
        size += keys.nbytes + values.nbytes
    assert size == 10 * kv_bytes(model, model.dtype.itemsize)
