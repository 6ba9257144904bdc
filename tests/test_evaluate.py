"""k-NN against a loop in float64; feature extraction against one image at a time."""

import numpy as np
import pytest
import torch
from conftest import demo_array
from torch import nn

from lowdino import augment, data, evaluate


def loop_knn(train, labels, test, k, temperature, classes):
    train, test = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (train, test))
    scores = np.zeros((len(test), classes))
    for i, x in enumerate(test):
        similarity = train @ x
        for j in np.argsort(-similarity)[:k]:
            scores[i, labels[j]] += np.exp(similarity[j] / temperature)
    return np.where(scores > 0, scores, -np.inf)  # a class without a vote


@pytest.mark.parametrize("k, classes", [(1, 3), (20, 3), (20, 40), (1000, 7)])
def test_knn_is_the_loop(k, classes):
    rng = np.random.default_rng(k + classes)
    train, test = rng.normal(size=(150, 8)), rng.normal(size=(40, 8))
    labels = rng.integers(0, classes, 150)
    ours = evaluate.knn_classify(
        torch.tensor(train), torch.tensor(labels), torch.tensor(test), k, 0.07, classes
    )
    assert ours.shape == (40, classes)
    expected = loop_knn(train, labels, test, min(k, 150), 0.07, classes)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert (ours.argmax(1).numpy() == expected.argmax(1)).all()


def test_chunks_change_nothing():
    train, test = torch.randn(50, 4), torch.randn(33, 4)
    at_once = evaluate.nearest_neighbours(train, test, 5)
    pieces = evaluate.nearest_neighbours(train, test, 5, chunk_bytes=50 * 4 * 7)
    torch.testing.assert_close(at_once[0], pieces[0])
    assert torch.equal(at_once[1], pieces[1])


def test_accuracy_counts_the_first_ranks():
    scores, labels = torch.tensor([[3.0, 2, 1], [1, 3, 2], [2, 1, 3]]), torch.tensor([0, 2, 1])
    assert [evaluate.accuracy(scores, labels, top) for top in (1, 2, 3)] == pytest.approx(
        [1 / 3, 2 / 3, 1]
    )


def test_a_class_without_a_vote_is_no_hit():
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randn(n, 6, generator=generator) for n in (60, 200))
    labels = torch.arange(60) % 10
    truth = torch.randint(10, (200,), generator=generator)
    nearest = evaluate.knn_classify(train, labels, test, k=1)
    top1, top5 = (evaluate.accuracy(nearest, truth, top) for top in (1, 5))
    assert 0 < top1 == top5 < 0.5
    everyone = evaluate.knn_classify(train, labels, test, k=60)
    assert evaluate.accuracy(everyone, truth, 10) == 1


def test_negative_logits_count_like_others():
    logits = torch.tensor([[-3.0, -1.0, -2.0], [0.0, 0.0, -1.0]])
    labels = torch.tensor([2, 2])
    assert [evaluate.accuracy(logits, labels, top) for top in (1, 2, 3)] == [0, 0.5, 1]


class Recorder(nn.Module):
    """Channel means, and the dtype of a convolution's output."""

    def __init__(self):
        super().__init__()
        self.conv, self.dtypes = nn.Conv2d(3, 4, 3), []

    def forward(self, x):
        y = self.conv(x)
        self.dtypes.append((x.dtype, y.dtype))
        return y.mean(dim=(2, 3))


def recorded(device):
    model = Recorder().to(device)
    features, _ = evaluate.extract_features(
        model,
        data.evaluation_loader(demo_array(range(6)), 3, 0),
        lambda x, s: augment.central_view(x, s, 32),
        device,
    )
    assert features.dtype == torch.float32 and features.device.type == torch.device(device).type
    assert not features.requires_grad and features.shape == (6, 4)
    return set(model.dtypes)


def test_features_on_a_cpu_are_computed_in_float32():
    assert recorded("cpu") == {(torch.float32, torch.float32)}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_features_on_cuda_are_computed_in_bfloat16():
    assert recorded("cuda") == {(torch.float32, torch.bfloat16)}


def test_features_are_those_of_each_image_in_eval_mode():
    images = demo_array(range(10))
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


def test_retrieval_map_against_a_loop():
    torch.manual_seed(0)
    train = evaluate.Features(torch.randn(40, 6), torch.randint(0, 4, (40,)), [])
    test = evaluate.Features(torch.randn(9, 6), torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 7]), [])
    precisions = []
    for query, label in zip(test.features[:8].double(), test.labels):  # of class 7 there are none
        cosines = [(query @ x / x.norm()).item() for x in train.features.double()]
        order = sorted(range(40), key=lambda i: -cosines[i])
        hits = [rank for rank, i in enumerate(order, 1) if train.labels[i] == label]
        precisions.append(sum(n / rank for n, rank in enumerate(hits, 1)) / len(hits))
    expected = sum(precisions) / len(precisions)
    assert evaluate.retrieval_map(train, test, chunk=4) == pytest.approx(expected)


def test_retrieval_map_from_outside(call_script, picture_folder):
    flags = ["--pixels", "--data_path", picture_folder, "--map", "--nb_knn", "1"]
    assert "retrieval mAP 1.0000" in call_script("eval_knn.py", *flags).stdout  # dark and light
