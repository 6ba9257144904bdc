"""k-NN against a loop in float64; feature extraction against one image at a time."""

import numpy as np
import pytest
import torch
from torch import nn

from lowdino import augment, data, evaluate


def loop_knn(train, labels, test, k, temperature, classes):
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    scores = np.zeros((len(test), classes))
    for i, x in enumerate(test):
        similarity = train @ x
        for j in np.argsort(-similarity)[:k]:
            scores[i, labels[j]] += np.exp(similarity[j] / temperature)
    return scores


@pytest.mark.parametrize("k, classes", [(1, 3), (20, 3), (20, 40), (1000, 7)])
def test_knn_is_the_loop(k, classes):
    rng = np.random.default_rng(k + classes)
    train, test, labels = (
        rng.normal(size=(150, 8)),
        rng.normal(size=(40, 8)),
        rng.integers(0, classes, 150),
    )
    ours = evaluate.knn_classify(
        torch.tensor(train), torch.tensor(labels), torch.tensor(test), k, 0.07, classes
    )
    assert ours.shape == (40, classes)
    expected = loop_knn(train, labels, test, min(k, 150), 0.07, classes)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert (ours.argmax(1).numpy() == expected.argmax(1)).all()


def test_chunks_change_nothing():
    train, test = torch.randn(50, 4), torch.randn(33, 4)
    whole = evaluate.nearest_neighbours(train, test, 5)
    pieces = evaluate.nearest_neighbours(train, test, 5, chunk_bytes=50 * 4 * 7)
    torch.testing.assert_close(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


def test_accuracy_counts_the_first_ranks():
    scores, labels = torch.tensor([[3.0, 2, 1], [1, 3, 2], [2, 1, 3]]), torch.tensor([0, 2, 1])
    assert [evaluate.accuracy(scores, labels, top) for top in (1, 2, 3)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


def test_features_are_those_of_each_image_in_eval_mode():
    images = data.demo_images(range(10))
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten()
    ).train()
    features, labels = evaluate.extract_features(
        model, data.evaluation_loader(images, 3, 0), lambda x, s: augment.central_view(x, s, 32)
    )
    assert model.training and labels.tolist() == list(range(10)) and features.dtype == torch.float32
    model.eval()
    for i in range(10):
        x = augment.central_view(images.images[i : i + 1], torch.tensor([[64, 64]]), 32)
        torch.testing.assert_close(features[i], model(x)[0], atol=1e-5, rtol=1e-4)
