"""sai_dpo.py's rules against tables worked out by hand, clusters against scikit-learn and sentence-transformers where
they are, and the records of real runs against a recomputation."""
import json
import math
import shutil
import time

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

import common
import sai_dpo
from conftest import TOY, launch
from test_runs import counts, error_of, files, killed, lines

SMALL = ["--toy", "--n-train", "150", "--samples-per-round", "16", "--pairs-per-round", "5", "--n-test", "8",
         "--rounds", "2", "--run", "one"]
ONE = [*SMALL, "--rounds", "1", "--n-train", "30", "--samples-per-round", "10", "--n-test", "4", "--k-samples", "4"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder with the finished run "one": sai_dpo.py, smoke-sized, on one process. Only for reading."""
    folder = tmp_path_factory.mktemp("small")
    launch(folder, "sai_dpo.py", *SMALL, processes=1)
    return folder


# Rules ----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, tags", [
    ('["Geometry", "area of a trapezoid"]', ["geometry", "area of a trapezoid"]),
    ('<think>Perhaps ["algebra"]?</think>\n```json\n["number theory", "Modular  arithmetic"]\n```',
     ["number theory", "modular arithmetic"]),
    ('<think>["algebra"]</think> I cannot say.', []),
    ('["first"] or rather ["second", "third"]', ["second", "third"]), ('["first", "second",]', ["first", "second"]),
    ("['Vieta's formulas', 'roots']", ["vieta's formulas", "roots"]),
    ('["area \\(x^2\\)", "\\\\frac", "x"]', ["area \\(x^2\\)", "\\frac"]),  # one letter is no tag
    ('["polynomials over Z[x]", "intervals [0,1]"]', ["polynomials over z[x]", "intervals [0,1]"]),
    ('["area of\n a triangle", "algebra"]', ["area of a triangle", "algebra"]),
    ('["' + "long " * 40 + '", "algebra"]', ["algebra"]),
    ('["aa", "aa", "bb", "cc", "dd", "ee", "ff"]', ["aa", "bb", "cc", "dd", "ee"]),
    ('[{"tag": "geometry"}, 7, "sums"]', ["sums"]), ('["caf\\u00e9s"]', ["cafés"]),
    ('["the angle \\theta", "\\binom{n}{k}"]', ["the angle \\theta", "\\binom{n}{k}"]),  # no tabulator
    ('["geometry", "lines"]\n\nNote: [see "above", "okay"].', ["geometry", "lines"]),  # JSON before what is nearly so
    ("The interval [0, 1] and [2, 3].", []), ("[]", []), ("1. Geometry\n2. Triangles", []),
    ("", []), ("[", []), ('["unfinished", "list', []), ("]" * 9 + "[" * 9, []),
])
def test_tags(text, tags):
    assert sai_dpo.parse_tags({"text": text, "finish": "stop"}) == tags
    assert sai_dpo.parse_tags({"text": text, "finish": "length"}) == []  # perhaps still thinking


@pytest.mark.parametrize("piece", ["[", "['", "[\"a\" ", "\"' ", "['a', ", "[\"a\n", "</think>[", "\\", "['\t", '["[',
                                   '[{"a":', '["a",'])
def test_hostile_tagger_output_costs_nothing(piece):
    text, began = piece * (200_000 // len(piece)), time.process_time()
    assert sai_dpo.parse_tags({"text": text + "]", "finish": "stop"}) == []
    sai_dpo.steps_of(text)
    sai_dpo.steps_of("\n \n" * 60_000 + "Step 1" + " \t#" * 20_000)
    assert time.process_time() - began < 1  # tenths of it; a quadratic search takes minutes


@pytest.mark.parametrize("text, steps", [
    ("", 0), ("\\boxed{4}", 1), ("a\nb", 1), ("a\n\nb", 2), ("a\n \t\nb\n\n\n\nc\n", 3), ("a\r\n\r\nb", 2),
    ("Step 1: a\nStep 2: b\n\nso\n\nand so", 2),  # markers count where there are any
    ("**Step 1** a\n\n## Step 2\n\n  step 3. b", 3), ("In step 2 we\n\nsaw Step 1", 2),  # only at the start of a line
])
def test_steps(text, steps):
    assert sai_dpo.steps_of(text) == steps


def test_difficulty_and_its_order():
    """By hand: p, mean steps, mean length of four draws each; cut ones are wrong, and in no mean. The table is ordered
    from the easiest to the hardest."""
    table = [
        (([1, 1, 1, 1], [9, 9, 9, 9], [99, 99, 99, 99]), (1.0, 9, 99)),  # whatever its length
        (([1, 1, 1, 0], [2, 2, 2, 2], [10, 10, 10, 14]), (0.75, 2, 11)),
        (([1, 1, 0, 1], [2, 2, 2, 2], [10, 10, 10, 18]), (0.75, 2, 12)),  # as often, as many steps, longer
        (([1, 0, 1, 1], [2, 2, 2, 4], [1, 1, 1, 1]), (0.75, 2.5, 1)),  # more steps, though shorter
        (([1, -1, 1, -1], [1, 50, 1, 50], [5, 96, 7, 96]), (0.5, 1, 6)),  # two were cut
        (([0, 0, 0, -1], [1, 2, 3, 9], [1, 2, 3, 96]), (0.0, 2, 2)),
        (([-1, -1, -1, -1], [9, 9, 9, 9], [96, 96, 96, 96]), (0.0, None, None)),  # all were cut: hardest
    ]
    found = [sai_dpo.difficulty_of(*draws) for draws, _ in table]
    assert found == [numbers for _, numbers in table]
    keys = [sai_dpo.key_of(*numbers) for numbers in found]
    assert keys == sorted(keys) and len(set(keys)) == len(keys)
    assert keys[1] == (0.25, 2, 11) and keys[-1] == (1, math.inf, math.inf)


def test_masses_and_shares(monkeypatch):
    """Errors 0.5, 2 and 0 of 2, 2 and 1 probed problems; 10, 20 and 5 unused: 2.5, 20 and 0, times 2.5 / 22.5."""
    rates, unused = [[1.0, 0.5], [0.0, 0.0], [1.0]], np.array([10, 20, 5])
    masses = sai_dpo.error_masses(rates, unused)
    assert masses == pytest.approx([2.5 / 9, 20 / 9, 0]) and masses.sum() == pytest.approx(2.5)
    assert sai_dpo.shares_of(masses) == pytest.approx([(2.5 / 9 + 1) / 5.5, (20 / 9 + 1) / 5.5, 1 / 5.5])
    assert sai_dpo.error_masses(rates, np.array([10, 0, 5])) == pytest.approx([2.5, 0, 0])  # one is used up
    assert sai_dpo.error_masses([[1.0], [1.0]], np.array([3, 4])) == pytest.approx([0, 0])  # no failures at all
    assert sai_dpo.shares_of(np.zeros(4)) == pytest.approx([0.25] * 4)
    monkeypatch.setattr(sai_dpo, "SMOOTHING", 0.0)
    assert sai_dpo.shares_of(masses) == pytest.approx([1 / 9, 8 / 9, 0])
    assert sai_dpo.shares_of(np.zeros(4)) == pytest.approx([0.25] * 4)  # nothing to go by
    assert sai_dpo.difficulty_weights([[0.5, 1.0], [0.0], [0.25]]) == pytest.approx([0.5, 0.1, 0.75])


@pytest.mark.parametrize("shares, room, total, counts", [
    ([0.5, 0.3, 0.2], [99, 99, 99], 10, [5, 3, 2]),
    ([0.5, 0.3, 0.2], [2, 99, 99], 10, [2, 5, 3]),  # 8 left, at 3 : 2 -> 4.8 and 3.2
    ([0.5, 0.3, 0.2], [2, 3, 99], 10, [2, 3, 5]),  # and on to the next
    ([0.5, 0.3, 0.2], [2, 3, 4], 10, [2, 3, 4]),  # 9 are all there are
    ([1 / 3, 1 / 3, 1 / 3], [9, 9, 9], 8, [3, 3, 2]),  # of equal remainders the first
    ([0.6, 0.25, 0.15], [9, 9, 9], 3, [2, 1, 0]),  # 1.8, 0.75, 0.45
    ([0.7, 0.0, 0.3], [3, 9, 3], 9, [3, 0, 3]),  # without a share nothing, even so
    ([0.0, 0.0], [9, 9], 5, [0, 0]), ([0.9, 0.1], [0, 0], 5, [0, 0]), ([1.0], [7], 0, [0]),
])
def test_quotas_and_their_redistribution(shares, room, total, counts):
    assert common.apportion(np.array(shares), np.array(room), total).tolist() == counts


def test_quotas_for_many_sizes():
    rng = np.random.default_rng(0)
    for _ in range(2000):
        n = int(rng.integers(1, 30))
        shares = rng.dirichlet(np.ones(n)) * (rng.random(n) < 0.9)
        room, total = rng.integers(0, 40, n), int(rng.integers(0, 900))
        found = common.apportion(shares, room, total)
        assert found.sum() == min(total, room[shares > 0].sum()) and (found <= room).all() and (found >= 0).all()
        free = (found < room) & (shares > 0)
        if free.any():  # those with room left have their parts of what the others left over, to one
            parts = shares[free] / shares[free].sum() * found[free].sum()
            assert np.abs(parts - found[free]).max() < 1 + 1e-6


def test_probe(monkeypatch):
    """Its size, as stated: PROBE of all, but 2 of each cluster at least (or all it has), else each cluster's part."""
    rng = np.random.default_rng(0)
    for share, sizes, expected in ((0.01, [6000, 3000, 1000], [60, 30, 10]), (0.01, [900, 90, 10], [6, 2, 2]),
                                   (0.01, [50, 40, 1], [2, 2, 1]), (0.1, [50, 30, 20], [5, 3, 2]),
                                   (0.5, [1, 1, 1, 97], [1, 1, 1, 47]), (0.01, [2, 1, 1], [2, 1, 1])):
        monkeypatch.setattr(sai_dpo, "PROBE", share)
        clusters = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
        probe = sai_dpo.probe_of(clusters, np.random.default_rng(1))
        assert np.bincount(clusters[probe], minlength=len(sizes)).tolist() == expected
        assert probe == sorted(set(probe)) == sai_dpo.probe_of(clusters, np.random.default_rng(1))
    clusters = np.arange(1000) % 4
    monkeypatch.setattr(sai_dpo, "PROBE", 0.01)
    assert len({tuple(sai_dpo.probe_of(clusters, np.random.default_rng(s))) for s in range(5)}) == 5
    for _ in range(100):
        clusters = rng.permutation(np.append(rng.integers(0, 20, int(rng.integers(20, 6000))), np.arange(20)))
        sizes, found = np.bincount(clusters), np.bincount(clusters[sai_dpo.probe_of(clusters, rng)], minlength=20)
        assert found.sum() == max(round(0.01 * len(clusters)), np.minimum(2, sizes).sum())
        assert (found >= np.minimum(2, sizes)).all()


def test_draws_are_those_of_the_shares():
    """Of 60, 30 and 10 problems, at shares 1/5, 1/5 and 3/5: 4, 4, 12; then all 10 of the last are gone, and its part
    goes to the others. Inside a cluster all are as likely; without weights all problems are."""
    clusters, pool = np.repeat([0, 1, 2], [60, 30, 10]), np.arange(100)
    shares, times = np.array([0.2, 0.2, 0.6]), np.zeros(100)
    for seed in range(400):
        drawn = sai_dpo.draw(pool, clusters, shares, 10, np.random.default_rng(seed))
        assert np.bincount(clusters[drawn]).tolist() == [2, 2, 6] and len(set(drawn.tolist())) == 10
        times[drawn] += 1
    assert times[:60].mean() == pytest.approx(400 / 30) and 0 < times[:60].min() and times[:60].max() < 35  # q / |A|
    drawn = sai_dpo.draw(pool, clusters, shares, 20, np.random.default_rng(0))
    assert np.bincount(clusters[drawn]).tolist() == [5, 5, 10]  # 12 wanted of the last, 10 there
    evenly = np.mean([np.bincount(clusters[sai_dpo.draw(pool, clusters, None, 10, np.random.default_rng(s))],
                                  minlength=3) for s in range(400)], 0)
    assert evenly == pytest.approx([6, 3, 1], abs=0.2)


@pytest.mark.parametrize("weights", [np.array([0.1, 0.2, 0.7]), None])
def test_no_problem_twice_until_all_were_drawn(weights):
    clusters, pool = np.arange(60) % 3, np.arange(5, 60)  # 55 problems: 3 rounds and 7
    used, rounds = pool[:0], []
    for t in range(1, 5):
        drawn, used = sai_dpo.draw_round(pool, used, clusters, weights, 16, np.random.default_rng(t))
        rounds.append(drawn.tolist())
        assert len(set(rounds[-1])) == 16 and set(rounds[-1]) <= set(pool.tolist()) and rounds[-1] == sorted(rounds[-1])
    first = [i for r in rounds[:3] for i in r]
    assert len(set(first)) == 48 and set(pool.tolist()) - set(first) <= set(rounds[3])  # the last 7, and then others
    assert sorted(used.tolist()) == rounds[3]  # those of the new pass
    drawn, used = sai_dpo.draw_round(pool, pool[:0], clusters, weights, 55, np.random.default_rng(0))
    assert drawn.tolist() == used.tolist() == pool.tolist()
    assert len(sai_dpo.draw_round(pool, used, clusters, weights, 5, np.random.default_rng(0))[1]) == 5  # all over again


ROWS = [{"cluster": j, "outcomes": outcomes, "p": outcomes.count(1) / len(outcomes), "steps": steps, "length": length}
        for j, outcomes, steps, length in [
            (0, [1, 1, 1, 0], 2, 9), (0, [1, 0, 0, 0, 0], 2, 9), (0, [1, 0, 0, 0, 0], 3, 9), (0, [1, 1, 0, 0], 9, 9),
            (1, [1, 1, 1, 0], 5, 5), (1, [1, 1, 1, 0], 5, 6), (1, [1, 1, 1, 1], 9, 9), (1, [0, 0, 0, 0], 9, 9),
            (1, [1, 1, -1, -1], 9, 9), (2, [-1, -1, -1, -1], None, None)]]


@pytest.mark.parametrize("select, prefer, kept", [
    ("both", "hardest", [2, 1, 5]), ("static", "hardest", [2, 1, 5]),  # shares 2 : 1 : 1 of 3 pairs, none in the last
    ("both", "middle", [3, 0, 5]),  # rows 1 and 2 have p = 0.2: behind the others
    ("difficulty", "hardest", [2, 1, 3]), ("difficulty", "middle", [3, 5, 4]),
])
def test_what_is_kept(monkeypatch, select, prefer, kept):
    monkeypatch.setattr(sai_dpo, "SELECT", select)
    monkeypatch.setattr(sai_dpo, "PREFER", prefer)
    monkeypatch.setattr(sai_dpo, "PAIRS_PER_ROUND", 3)
    assert sai_dpo.keep(ROWS, np.array([0.5, 0.25, 0.25]), np.random.default_rng(0)) == kept


def test_what_is_kept_at_random(monkeypatch):
    monkeypatch.setattr(sai_dpo, "PAIRS_PER_ROUND", 3)
    for select, per_cluster in (("knowledge", {(2, 1)}), ("random", {(3, 0), (2, 1), (1, 2)})):
        monkeypatch.setattr(sai_dpo, "SELECT", select)
        found = [sai_dpo.keep(ROWS, np.array([0.5, 0.25, 0.25]), np.random.default_rng(s)) for s in range(200)]
        assert {i for kept in found for i in kept} == {0, 1, 2, 3, 4, 5}  # the learnable ones
        assert {tuple(np.bincount([ROWS[i]["cluster"] for i in kept], minlength=2)) for kept in found} == per_cluster
        assert sai_dpo.keep(ROWS[6:], np.array([0.5, 0.25, 0.25]), np.random.default_rng(0)) == []


def test_a_pair_is_a_random_right_and_a_random_wrong_one():
    found = {tuple(sai_dpo.choose_pair([1, 0, -1, 1, 0], np.random.default_rng(s))) for s in range(60)}
    assert found == {(0, 1), (0, 4), (3, 1), (3, 4)}  # never the cut one


# Clusters -------------------------------------------------------------------------------------------------------------

def adjusted_rand_index(a, b):
    """Agreement of two partitions, 0 on average for random ones and 1 for the same (Hubert & Arabie 1985)."""
    table = np.zeros((max(a) + 1, max(b) + 1))
    np.add.at(table, (a, b), 1)
    def pairs(x):
        return (x * (x - 1) / 2).sum()
    both, one, other, all_ = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(np.array([len(a)]))
    return (both - one * other / all_) / ((one + other) / 2 - one * other / all_)


def test_kmeans_finds_separated_groups(monkeypatch):
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(6), [50, 40, 30, 20, 10, 5]))
    points = (rng.normal(size=(6, 16))[truth] * 5 + rng.normal(size=(155, 16)) * 0.1).astype(np.float32)
    clusters, inertia = common.kmeans(points, 6, np.random.default_rng(1))
    assert (clusters == truth).all()  # numbered by size too
    assert inertia == pytest.approx(sum(((points[truth == j] - points[truth == j].mean(0)) ** 2).sum()
                                        for j in range(6)), rel=1e-3)
    monkeypatch.setattr(common, "START_POINTS", 40)  # begun on a few, finished on all
    assert adjusted_rand_index(common.kmeans(points, 6, np.random.default_rng(3))[0], truth) > 0.95
    threads = torch.get_num_threads()
    again = common.kmeans(points, 6, np.random.default_rng(1))[0]
    assert (again == common.kmeans(points, 6, np.random.default_rng(1))[0]).all() and torch.get_num_threads() == threads


def test_kmeans_of_few_different_points():
    points = common.tfidf(["sums"] * 4 + ["digit sums"] * 3 + ["", "7 + 8"])
    clusters, inertia = common.kmeans(points, 20, np.random.default_rng(0))
    assert clusters.tolist() == [0] * 4 + [1] * 3 + [2] * 2 and inertia == 0  # texts without words are alike
    assert common.kmeans(common.tfidf(["one text"] * 3), 20, np.random.default_rng(0))[0].tolist() == [0, 0, 0]


def test_an_empty_cluster_begins_again():
    points = torch.tensor([[0.0, 0.0], [0.0, 1.0], [9.0, 0.0], [9.0, 1.0], [50.0, 50.0]])
    clusters, _, inertia = common.lloyd(points, torch.tensor([[0.0, 0.5], [9.0, 0.5], [900.0, 900.0]]))
    assert clusters.tolist() == [0, 0, 1, 1, 2] and inertia == pytest.approx(1)


def test_tfidf_by_hand():
    """Two words at places of their own, of weights (1 + ln 2) ln(3/1) and ln(3/2); no two texts' signs differ."""
    a, b, c = common.tfidf(["rare rare common", "common", "\\frac{1}{2} 7"])
    rare, common_ = (1 + math.log(2)) * (math.log(3) + 1e-3), math.log(1.5) + 1e-3
    assert sorted(np.abs(a[a != 0]) / np.hypot(rare, common_) ** -1) == pytest.approx(sorted([rare, common_]))
    assert float(a @ b) == pytest.approx(common_ / np.hypot(rare, common_)) and np.count_nonzero(c) == 1
    assert [np.linalg.norm(x) for x in (a, b, c)] == pytest.approx([1, 1, 1])


def test_maths_subjects(shared):
    """Clusters of MATH's training problems, by tf-idf of their text, against its seven subjects; and k-means against
    scikit-learn's."""
    problems = common.load_problems("math", "train", shared / "data")
    names = sorted({p["tags"][0] for p in problems})
    subjects = np.array([names.index(p["tags"][0]) for p in problems])
    points = common.tfidf([p["problem"] for p in problems])
    clusters, inertia = common.kmeans(points, 20, np.random.default_rng(0))
    found, rng = adjusted_rand_index(clusters, subjects), np.random.default_rng(0)
    chance = [adjusted_rand_index(clusters, rng.permutation(subjects)) for _ in range(200)]
    print(f"adjusted Rand index {found:.4f}, of 200 permutations 99 % below {np.quantile(chance, 0.99):.4f}")
    assert len(names) == 7 and found > np.quantile(chance, 0.99)
    theirs = KMeans(20, n_init=10, random_state=0).fit(points).inertia_
    print(f"inertia {inertia:.1f}, scikit-learn's {theirs:.1f}")
    assert inertia < 1.01 * theirs


def write_encoder(folder, pooling="mean", layer="Normalize"):
    """A small random BERT in the files of a sentence encoder, as published ones have them."""
    from transformers import BertConfig, BertModel, BertTokenizerFast
    folder.mkdir()
    letters = [chr(i) for i in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=64).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                         intermediate_size=64, max_position_embeddings=64)).save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text(json.dumps([
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_x", layer)])]))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **{
        f"pooling_mode_{way}": way.startswith(pooling) for way in ("cls_token", "mean_tokens", "max_tokens")}}))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    return folder


TEXTS = ["sums", "area of a trapezoid, geometry", "x" * 500, "Find the number of " * 40, "", "modular arithmetic"] * 20


def test_embeddings(tmp_path, alone):
    """Batched and padded as one by one, and as sentence-transformers has them."""
    from transformers import AutoModel, AutoTokenizer
    folder = write_encoder(tmp_path / "encoder")
    vectors = common.embed(str(folder), TEXTS)
    body, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(TEXTS[:6], vectors):
        ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")
        with torch.inference_mode():
            mean = body(**ids).last_hidden_state[0].mean(0)
        assert np.abs(vector - (mean / mean.norm()).numpy()).max() < 1e-5
    assert (vectors[:6] == vectors[6:12]).mean() > 0.5 and np.allclose(np.linalg.norm(vectors, axis=1), 1)
    from sentence_transformers import SentenceTransformer  # a second or two
    theirs = SentenceTransformer(str(folder), device="cpu").encode(TEXTS, normalize_embeddings=True)
    print(f"largest difference from sentence-transformers {np.abs(vectors - theirs).max():.2g}")
    assert np.abs(vectors - theirs).max() < 1e-5


def test_a_published_encoder(alone):
    """all-mpnet-base-v2 against sentence-transformers, where it is on this machine."""
    name = "sentence-transformers/all-mpnet-base-v2"
    try:
        common.snapshot_download(name, local_files_only=True)
    except Exception as error:
        pytest.skip(f"{name} is not on this machine ({type(error).__name__})")
    from sentence_transformers import SentenceTransformer  # a second or two
    theirs = SentenceTransformer(name, device="cpu").encode(TEXTS, normalize_embeddings=True)
    assert np.abs(common.embed(name, TEXTS) - theirs).max() < 1e-5


def test_other_encoders_are_refused(tmp_path, capsys):
    for name, options, word in (("cls", dict(pooling="cls"), "not plain means over tokens, as here (pooling_mode_cls"),
                                ("dense", dict(layer="Dense"), "not plain means over tokens, as here (Dense)"),
                                ("odd", {}, "modules.json, ")):
        folder = write_encoder(tmp_path / name, **options)
        if name == "odd":
            (folder / "modules.json").write_text('{"0": "Transformer"}')
        with pytest.raises(SystemExit):
            common.read_encoder(str(folder))
        assert word in capsys.readouterr().err
    line = error_of(launch(tmp_path, "sai_dpo.py", *ONE, "--embedder", "cls", check=False))
    assert "not plain means" in line and not (tmp_path / "runs").exists()  # before anything is done


# Real runs ------------------------------------------------------------------------------------------------------------

def recompute(run, rounds, pairs_per_round):
    """Check each decision of a run against the records alone, with rules written down once more; the rounds' draws."""
    groups = {g["id"]: g for g in lines(run / "round_0/clusters.jsonl")}
    clusters, probe = 1 + max(g["cluster"] for g in groups.values()), [i for i, g in groups.items() if g["probed"]]
    sizes = [sum(g["cluster"] == j for g in groups.values()) for j in range(clusters)]
    assert sizes == sorted(sizes, reverse=True)
    tags = {}  # on the toy: one tag, one cluster
    assert all(tags.setdefault(g["cluster"], g["tags"]) == g["tags"] for g in groups.values()) and len(tags) == clusters
    drawn_before, every = set(), []
    for t in range(1, rounds + 1):
        answers = lines(run / f"round_{t}/probe.jsonl")
        assert list(dict.fromkeys(a["id"] for a in answers)) == probe
        rate = {i: sum(a["correct"] and a["finish"] == "stop" for a in answers if a["id"] == i) / 8 for i in probe}
        error, raw = 0, []
        for j in range(clusters):
            mine = [i for i in probe if groups[i]["cluster"] == j]
            unused = [i for i, g in groups.items() if g["cluster"] == j and not g["probed"] and i not in drawn_before]
            error += sum(1 - rate[i] for i in mine)
            raw.append(len(unused) / len(mine) * sum(1 - rate[i] for i in mine))
        masses = [m * error / sum(raw) for m in raw]
        shares = [(m + 1) / (sum(masses) + clusters) for m in masses]
        selection, answers = lines(run / f"round_{t}/selection.jsonl"), lines(run / f"round_{t}/responses.jsonl")
        assert [a["id"] for a in answers] == [s["id"] for s in selection for _ in range(8)]
        assert not drawn_before & {s["id"] for s in selection} and not {s["id"] for s in selection} & set(probe)
        drawn_before |= {s["id"] for s in selection}
        every.append([s["id"] for s in selection])
        drawn = [sum(s["cluster"] == j for s in selection) for j in range(clusters)]
        assert all(abs(n - share * len(selection)) < 1 for n, share in zip(drawn, shares))  # nothing runs out here
        for s in selection:
            own = [a for a in answers if a["id"] == s["id"]]
            whole = [a for a in own if a["finish"] == "stop"]
            assert s["outcomes"] == [(1 if a["correct"] else 0) if a["finish"] == "stop" else -1 for a in own]
            assert s["p"] == s["outcomes"].count(1) / 8 and s["cluster"] == groups[s["id"]]["cluster"]
            assert s["mass"] == pytest.approx(masses[s["cluster"]])
            assert s["share"] == pytest.approx(shares[s["cluster"]])
            steps = [len([x for x in a["text"].split("\n\n") if x.strip()]) for a in whole]
            assert s["steps"] == (pytest.approx(np.mean(steps)) if whole else None)
            assert s["length"] == (pytest.approx(np.mean([a["tokens"] for a in whole])) if whole else None)
        kept = [s for s in selection if s["pair"]]
        able = [s for s in selection if 1 in s["outcomes"] and 0 in s["outcomes"]]
        assert len(kept) == min(len(able), pairs_per_round)
        for s in kept:
            assert [s["outcomes"][d] for d in s["pair"]] == [1, 0]
            for other in able:  # of a cluster the hardest
                if other["cluster"] == s["cluster"] and not other["pair"]:
                    assert (1 - s["p"], s["steps"], s["length"]) >= (1 - other["p"], other["steps"], other["length"])
        text = {(a["id"], a["draw"]): a["text"] for a in answers}
        assert [(e["id"], e["completions"]) for e in lines(run / f"round_{t}/train.jsonl")] == [
            (s["id"], [text[s["id"], d] for d in s["pair"]]) for s in kept]
    return every


def test_the_records_alone_tell_every_decision(small):
    run = small / "runs" / "one"
    every = recompute(run, 2, 5)
    assert all(len(drawn) == 16 for drawn in every)
    assert {p.name for p in (run / "round_0").iterdir()} == {"clusters.jsonl", "eval.json"}  # tagged already
    report = [m["clusters"] for m in lines(run / "metrics.jsonl") if m["phase"] == "select"]
    for clusters, t in zip(report, (1, 2), strict=True):
        selection = lines(run / f"round_{t}/selection.jsonl")
        assert sum(c["share"] for c in clusters) == pytest.approx(1) and sum(c["problems"] for c in clusters) == 150
        for j, c in enumerate(clusters):
            mine = [s for s in selection if s["cluster"] == j]
            assert c["drawn"] == len(mine) and c["kept"] == sum(bool(s["pair"]) for s in mine) and c["probed"] >= 2
            assert c["tags"] == lines(run / "round_0/clusters.jsonl")[
                [g["cluster"] for g in lines(run / "round_0/clusters.jsonl")].index(j)]["tags"]


def test_the_planted_weakness_is_found_and_drawn_more(tmp_path):
    """The toy was made weak at remainders: the probe of 40 problems sees it, and the draw follows."""
    launch(tmp_path, "sai_dpo.py", *ONE, "--n-train", "200", "--probe", "0.2", "--k-samples", "8",
           "--samples-per-round", "20")
    [found] = [m["clusters"] for m in lines(tmp_path / "runs/one/metrics.jsonl") if m["phase"] == "select"]
    weak = max(found, key=lambda c: c["error"])
    assert weak["tags"] == ["remainders"] and weak["share"] > 1.2 * weak["problems"] / 200
    assert weak["drawn"] / 20 > weak["problems"] / 200


def test_two_processes_choose_the_same(small, tmp_path):
    """Given the same responses: the same tags, clusters, draws, pairs. The first probe's are drawn anew, and equal."""
    one, two = small / "runs" / "one", tmp_path / "runs" / "one"
    (two / "round_1").mkdir(parents=True)
    (two / "round_2").mkdir()
    for name in ("round_1/responses.jsonl", "round_1/model", "round_2/probe.jsonl", "round_2/responses.jsonl"):
        (shutil.copytree if "model" in name else shutil.copy)(one / name, two / name)
    launch(tmp_path, "sai_dpo.py", *SMALL, processes=2)
    for name in ("round_0/clusters.jsonl", "round_1/probe.jsonl", *(f"round_{t}/{name}.jsonl" for t in (1, 2)
                                                                     for name in ("selection", "train"))):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


PHASES = ["round_0/clusters.jsonl", "round_0/eval.json", *(f"round_{t}/{name}" for t in (1, 2) for name in (
    "probe.jsonl", "responses.jsonl", "selection.jsonl", "train.jsonl", "model", "eval.json"))]


@pytest.mark.parametrize("place, left, to_come", [
    ("group:1", "", 0), ("Draws.put:30", "round_1-probe@0.jsonl", 2),
    ("Sampler._generate:1", "round_2-rollout@0.jsonl", 9), ("select:1", "", 10),
    ("scale_and_clip:1", "round_2-reference.json", 12), ("Sampler._generate:1", "round_2-eval@0.jsonl", 13)])
def test_a_killed_run_goes_on(small, tmp_path, place, left, to_come):
    """One SIGKILL in each phase; the rerun ends with the same files, bit for bit."""
    shutil.copytree(small / "runs", tmp_path / "runs")
    run = tmp_path / "runs" / "one"
    for name in PHASES[to_come:]:
        shutil.rmtree(run / name) if (run / name).is_dir() else (run / name).unlink()
    assert left in [*killed(tmp_path, "sai_dpo", place, *SMALL), ""]
    launch(tmp_path, "sai_dpo.py", *SMALL)
    assert files(run) == files(small / "runs" / "one")
    assert counts(run) == counts(small / "runs" / "one")


@pytest.fixture(scope="module")
def tagger(tmp_path_factory):
    """The toy model, taught in seconds to name a problem's knowledge point as it is asked to: often right, sometimes
    misspelt, sometimes no list at all. What published taggers do too."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    folder = tmp_path_factory.mktemp("tagger") / "model"
    tokenizer = AutoTokenizer.from_pretrained(TOY / "model")
    network = AutoModelForCausalLM.from_pretrained(TOY / "model")
    problems, optimizer = lines(TOY / "train.jsonl")[:64], torch.optim.AdamW(network.parameters(), lr=1.5e-3)
    end, threads = common.end_token(tokenizer, "chat"), torch.get_num_threads()
    torch.set_num_threads(1)
    for step in range(80):
        for p in problems[step * 2 % 64:][:2]:
            prompt = common.make_prompt(tokenizer, "chat", {"problem": sai_dpo.tag_request(p)})
            prompt = common.encode(tokenizer, prompt)
            tags = tokenizer(json.dumps(["arithmetic", *p["tags"]]) + end, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([prompt + tags])
            labels = ids.masked_fill(torch.arange(ids.shape[1]) < len(prompt), -100)
            network(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    shutil.copytree(TOY / "model", folder)
    network.save_pretrained(folder)
    return folder


def untagged(folder, n=40, keep=8):
    """Toy problems, of which the first few alone have tags, as a file for --train-data."""
    problems = lines(TOY / "train.jsonl")[100:100 + n]
    (folder / "untagged.jsonl").write_text("".join(
        json.dumps({k: v for k, v in p.items() if k != "tags" or i < keep}) + "\n" for i, p in enumerate(problems)))
    return [*ONE, "--train-data", "untagged.jsonl", "--n-train", "0"]


def test_the_tagger(tagger, tmp_path):
    """Its output decides the clusters; what it cannot tag is asked again, then embedded as it is. Killed while it is at
    work, the run goes on; with two processes it says the same."""
    flags = [*untagged(tmp_path), "--tagger", tagger, "--tag-tokens", "24", "--embedder", TOY / "model"]
    one, two = tmp_path / "runs" / "one", tmp_path / "runs" / "two"
    assert killed(tmp_path, "sai_dpo", "Sampler._generate:1", *flags) == ["round_0-tag@0.jsonl"]
    done = launch(tmp_path, "sai_dpo.py", *flags)
    outputs, groups = lines(one / "round_0/tagger.jsonl"), lines(one / "round_0/clusters.jsonl")
    assert len({o["id"] for o in outputs}) == 32 and len(groups) == 40
    found = {}
    for o in outputs:  # a second try where there were no tags before, and not a third
        assert not found.get(o["id"]) and o["draw"] == (o["id"] in found)
        found[o["id"]] = sai_dpo.parse_tags(o)
        assert o["correct"] == bool(found[o["id"]])
    assert all(g["tags"] == found.get(g["id"], g["tags"]) for g in groups) and all(g["tags"] for g in groups[:8])
    right = sum("arithmetic" in g["tags"] for g in groups[8:])
    without = sum(not g["tags"] for g in groups)
    print(f"{right} of 32 have tags of the kind that was taught, {len(outputs)} outputs")
    assert right >= 8 and len(outputs) == 32 + sum(o["draw"] == 1 for o in outputs)
    assert f"({without} problems without a tag, by their text)" in done.stdout and "32 to be tagged" in done.stdout
    assert "usable" in next(line for line in done.stdout.splitlines() if "round 0  tag" in line)
    [metrics] = [m for m in lines(one / "metrics.jsonl") if m["phase"] == "tag"]
    assert metrics["correct"] == metrics["check_usable"] and metrics["draws"] == len(outputs)
    (tmp_path / "grader.py").write_text("def grade(problem, text):\n    return True, 'equal'\n")  # it grades no tags
    launch(tmp_path, "sai_dpo.py", *flags, "--run", "two", "--rounds", "0", "--grader", "grader.py:grade", processes=2)
    for name in ("tagger.jsonl", "clusters.jsonl"):
        assert (one / "round_0" / name).read_bytes() == (two / "round_0" / name).read_bytes()
    again = tmp_path / "runs" / "again" / "round_0"  # what was tagged once serves another run, if it is of its problems
    again.mkdir(parents=True)
    shutil.copy(one / "round_0/tagger.jsonl", again)
    launch(tmp_path, "sai_dpo.py", *flags, "--run", "again", "--rounds", "0", "--seed", "5")
    assert {i["id"]: i["tags"] for i in lines(again / "clusters.jsonl")} == {g["id"]: g["tags"] for g in groups}
    (again.parent / "constants.json").unlink()
    done = launch(tmp_path, "sai_dpo.py", *untagged(tmp_path, 39), *flags[len(ONE) + 4:], "--run", "again", "--rounds",
                  "0", check=False)
    assert "what is copied there is of other problems" in error_of(done)
    untagged(tmp_path)
    weights = (tagger / "model.safetensors").read_bytes()
    (tagger / "model.safetensors").write_bytes((TOY / "model" / "model.safetensors").read_bytes())
    assert "contents" in error_of(launch(tmp_path, "sai_dpo.py", *flags, check=False))  # another tagger of that name
    (tagger / "model.safetensors").write_bytes(weights)


def test_a_tagger_that_says_nothing_of_use(tmp_path):
    """Empty outputs, some without a list, some without an end: the problems' texts serve. And START, few_shot."""
    shutil.copytree(TOY / "model", tmp_path / "mute")
    (tmp_path / "mute" / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(0, 512, 2))}))
    flags = [*untagged(tmp_path), "--tagger", "mute", "--tag-tokens", "2", "--rounds", "2", "--n-clusters", "3",
             "--prompt", "few_shot", "--shots", "2", "--samples-per-round", "22", "--start", "base", "--k-samples",
             "2"]
    done = launch(tmp_path, "sai_dpo.py", *flags)
    run = tmp_path / "runs" / "one"
    outputs, groups = lines(run / "round_0/tagger.jsonl"), lines(run / "round_0/clusters.jsonl")
    assert len(outputs) == 64 and not any(o["correct"] for o in outputs)
    assert {o["finish"] for o in outputs} == {"length", "stop"} and "" in {o["text"] for o in outputs}
    assert sum(not g["tags"] for g in groups) == 32
    assert ("clusters 3 (32 problems without a tag, by their text), with 6 problems in the probe; from round 2 on some "
            "are drawn again") in done.stdout
    first, second = ({s["id"] for s in lines(run / f"round_{t}/selection.jsonl")} for t in (1, 2))
    assert len(first) == len(second) == 22 and len(first | second) == 34  # the 12 that were left, and 10 again
    assert all(e["prompt"].count("Question:") == 3 for e in lines(run / "round_1/train.jsonl"))
    again = tmp_path / "runs" / "again"
    shutil.copytree(run, again, ignore=shutil.ignore_patterns("constants.json", "metrics.jsonl", "eval.json"))
    shutil.rmtree(again / "round_2/model")
    launch(tmp_path, "sai_dpo.py", *flags, "--run", "again", "--start", "previous")
    weights = [(r / "round_2/model/model.safetensors").read_bytes() for r in (run, again)]
    assert weights[0] != weights[1]


def test_arms(small, tmp_path):
    """From the same records: "static" goes by the first probe in the second round too, "random" by none, "difficulty"
    without clusters; DIFFICULTY_BEFORE weighs the draw."""
    probes = [lines(small / f"runs/one/round_{t}/probe.jsonl") for t in (1, 2)]
    groups = {g["id"]: g for g in lines(small / "runs/one/round_0/clusters.jsonl")}

    def shares(probe, drawn=()):
        rates = [[np.mean([r["correct"] for r in probe if r["id"] == i]) for i, g in groups.items()
                  if g["probed"] and g["cluster"] == j] for j in range(5)]
        unused = [sum(g["cluster"] == j and not g["probed"] and i not in drawn for i, g in groups.items())
                  for j in range(5)]
        return rates, sai_dpo.shares_of(sai_dpo.error_masses(rates, np.array(unused)))

    def rerun(name, *flags, known):
        run = tmp_path / "runs" / name
        for path in known:
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if path.endswith("model") else shutil.copy)(small / "runs/one" / path, run / path)
        launch(tmp_path, "sai_dpo.py", *SMALL, *flags, "--run", name)
        return run

    run = rerun("static", "--select", "static", known=[*PHASES[:2], *PHASES[2:9]])
    selection = lines(run / "round_2/selection.jsonl")
    expected = shares(probes[0], {s["id"] for s in lines(run / "round_1/selection.jsonl")})[1]
    assert [s["share"] for s in selection] == pytest.approx([expected[s["cluster"]] for s in selection])
    other = [s["share"] for s in lines(small / "runs/one/round_2/selection.jsonl")]
    assert {round(s, 6) for s in other} != {round(s["share"], 6) for s in selection}  # what SELECT = "both" had
    rates, expected = shares(probes[0])
    for name, flags in (("random", ["--select", "random"]), ("difficulty", ["--select", "difficulty"]),
                        ("before", ["--difficulty-before"])):
        selection = lines(rerun(name, *flags, "--rounds", "1", known=PHASES[:3]) / "round_1/selection.jsonl")
        assert len(selection) == 16 and sum(bool(s["pair"]) for s in selection) == 5
        weights = expected * sai_dpo.difficulty_weights(rates)
        assert [s["weight"] for s in selection] == ([None] * 16 if name != "before" else pytest.approx(
            [weights[s["cluster"]] / weights.sum() for s in selection]))
        keys = sorted(((1 - s["p"], s["steps"], s["length"]), bool(s["pair"])) for s in selection
                      if {0, 1} <= {*s["outcomes"]})
        assert name != "difficulty" or sum(kept for _, kept in keys[-5:]) == 5  # the hardest, whatever their cluster


@pytest.mark.parametrize("verdict", [True, False])
def test_nothing_to_learn(tmp_path, verdict):
    """All right, so that no cluster has a failure and all have the same share, or all wrong: the model stays."""
    (tmp_path / "kind.py").write_text(f"def grade(problem, text):\n    return {verdict}, 'equal'\n")
    done = launch(tmp_path, "sai_dpo.py", *ONE, "--grader", "kind.py:grade", "--max-new-tokens", "200", "--rounds", "2",
                  "--samples-per-round", "6", "--k-samples", "2", "--tagger", "")
    run = tmp_path / "runs" / "one"
    assert done.stdout.count("no problem was answered both right and wrong: no pair, the model stays as it is") == 2
    for t in (1, 2):
        selection = lines(run / f"round_{t}/selection.jsonl")
        assert len(selection) == 6 and not any(s["pair"] for s in selection)
        assert {*sum((s["outcomes"] for s in selection), [])} <= {int(verdict), -1}  # a cut one is wrong
        assert not (run / f"round_{t}/model").exists()
        if verdict and {r["finish"] for r in lines(run / f"round_{t}/probe.jsonl")} == {"stop"}:
            assert {s["mass"] for s in selection} == {0} and len({s["share"] for s in selection}) == 1


@pytest.mark.parametrize("flags, words", [
    (["--n-train", "5", "--no-own-tags", "--tagger", "", "--n-clusters", "20"], "the probe takes all problems"),
    (["--select", "random", "--difficulty-before"], "--difficulty-before is for --select both or static"),
    (["--select", "knowledge", "--prefer", "middle"], "--prefer middle is for"),
    (["--no-own-tags", "--tagger", "no/such/tagger"], "no/such/tagger"), (["--embedder", "no/such/one"], "no/such/one"),
    (["--no-own-tags", "--tagger", "bare"], "bare has no chat template"),
])
def test_what_cannot_be_is_one_line(tmp_path, flags, words):
    if "bare" in flags:
        shutil.copytree(TOY / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
        path = tmp_path / "bare" / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "chat_template"}))
    assert words in error_of(launch(tmp_path, "sai_dpo.py", *ONE, *flags, check=False))


def test_fewer_problems_than_clusters(tmp_path):
    """As many clusters as there are different tags; the run does its work."""
    done = launch(tmp_path, "sai_dpo.py", *ONE, "--n-train", "14", "--n-clusters", "20")
    clusters = {g["cluster"] for g in lines(tmp_path / "runs/one/round_0/clusters.jsonl")}
    assert f"clusters {len(clusters)} (0 problems" in done.stdout and 3 <= len(clusters) <= 5
    assert (tmp_path / "runs/one/round_1/eval.json").exists()
