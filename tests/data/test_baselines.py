import math

import numpy as np
import pytest

from sambalm.data_pipeline.baselines import baseline_losses, bigram_cross_entropy, entropy, unigram_cross_entropy
from sambalm.data_pipeline.config import DataConfig
from tests.support.data import write_shard


def test_entropy():
    assert entropy(np.array([3, 3, 7, 7])) == pytest.approx(math.log(2))
    assert entropy(np.array([5, 5, 5])) == 0


def test_unigram_by_hand():
    # Counts plus one: id 0 has 3, id 1 has 2, id 2 has 1, of 6.
    losses = unigram_cross_entropy(np.array([0, 1, 0], dtype=np.uint16), np.array([0, 2]), vocab_size=3)
    assert losses == pytest.approx(-(math.log(3 / 6) + math.log(1 / 6)) / 2)


def test_unigram_of_uniform_data_is_the_logarithm_of_the_vocabulary():
    tokens = np.tile(np.arange(64), 100)
    assert unigram_cross_entropy(tokens, tokens, vocab_size=64) == pytest.approx(math.log(64))
    assert entropy(tokens) == pytest.approx(math.log(64))


def test_bigram_by_hand():
    # Pairs of 0 1 0 1 0 2: (0,1) twice, (1,0) twice, (0,2) once. One pair occurs once, two occur twice, so the
    # discount is 1 / (1 + 2 * 2) = 0.2. Ids 0, 1, 2 each follow one id, plus one makes 2 of 7, and id 3 has 1 of 7.
    stream = np.array([0, 1, 0, 1, 0, 2])

    def loss(token, label):
        return bigram_cross_entropy(stream, np.array([token]), np.array([label]), vocab_size=4)

    # After 0: three occurrences of two kinds leave 0.2 * 2 / 3 to the lower order.
    assert loss(0, 1) == pytest.approx(-math.log(1.8 / 3 + 0.4 / 3 * 2 / 7))
    assert loss(0, 2) == pytest.approx(-math.log(0.8 / 3 + 0.4 / 3 * 2 / 7))
    assert loss(0, 3) == pytest.approx(-math.log(0.4 / 3 * 1 / 7))
    # Nothing was seen after 2 or 3.
    assert loss(2, 0) == pytest.approx(-math.log(2 / 7))
    for token in range(4):
        assert sum(math.exp(-loss(token, label)) for label in range(4)) == pytest.approx(1)


def test_bigram_learns_what_a_unigram_cannot():
    stream = np.tile(np.arange(50), 40)
    assert bigram_cross_entropy(stream, stream[:-1], stream[1:], vocab_size=50) < 0.05


def test_baselines_count_training_documents_and_score_held_out_ones(tmp_path):
    # Trained on ids below 8, evenly; held out is id 9 alone.
    train = [np.tile(np.arange(8), 8)] * 9
    config = DataConfig(
        train=write_shard(tmp_path / "d", [*train, np.full(65, 9)]), sequence_length=16, validation_fraction=0.1
    )
    baselines = baseline_losses(config, validation_samples=100, vocab_size=10)
    tokens = 9 * 64
    assert baselines.unigram == pytest.approx(math.log((tokens + 10) / 1))
    assert baselines.unigram_entropy == 0
    # Every id below 8 follows one kind of id, so the lower order has 18 counts, of which id 9 has its added one.
    assert baselines.bigram == pytest.approx(math.log(18))
    few = baseline_losses(config, validation_samples=100, vocab_size=10, max_train_tokens=20)
    assert few.unigram == pytest.approx(math.log(30))
    # The bound is over all sources: 576 tokens of the first, 24 of the second.
    second = write_shard(tmp_path / "e", [*train, np.full(65, 9)])
    both = config.model_copy(update={"train": [config.train, second]})
    bounded = baseline_losses(both, validation_samples=100, vocab_size=10, max_train_tokens=600)
    assert bounded.unigram == pytest.approx(math.log(610))
