"""The stream: what a sample is depends on its position alone."""

import threading
from types import SimpleNamespace

import pytest
import torch

from dreamlora.errors import UserError
from dreamlora.randomness import permutation
from dreamlora.training.stream import Layout, Source, Stream, arranged


class Store:
    """Six images with two variants each."""

    def __init__(self, length=6):
        self.names = [f"{i}.png" for i in range(length)]
        self.captions = [(f"caption {i}",) for i in range(length)]

    def count(self, index):
        return 2

    def latents(self, index, variant):
        return torch.full((3, 4, 4), float(10 * index + variant)), torch.zeros(3, 4, 4)

    def mask(self, index, variant):
        return None

    def view(self, index, variant):
        return {"place": torch.tensor([[index, variant]], dtype=torch.float32)}


OBJECTIVE = SimpleNamespace(draw_times=lambda uniforms, sides: uniforms[:, 0])


def make_stream(batch_size=2, accumulation=1, rank=0, world=1, **more):
    sources = more.pop("sources", [Source("instance", Store(), 1.0)])
    layout = Layout(batch_size, accumulation, rank, world)
    return Stream(sources, OBJECTIVE, lambda captions, views: {"n": torch.zeros(len(captions))}, layout, seed=0, **more)


def rows(streams, step, accumulation=1):
    """Every sample of a step as (name, noise, time, latent), over all processes and micro-batches."""
    found = []
    for micro in range(accumulation):
        for stream in streams:
            for batch in stream.batches(step, micro):
                for k, name in enumerate(batch.names):
                    values = (batch.noise[k], batch.times[k], batch.latents[k])
                    found.append((name, tuple(value.sum().item() for value in values)))
    return sorted(found)


@pytest.mark.parametrize("step", [0, 3])
def test_one_process_two_processes_and_accumulation_see_the_same_samples(step):
    one = rows([make_stream(4)], step)
    two = rows([make_stream(2, rank=0, world=2), make_stream(2, rank=1, world=2)], step)
    accumulated = rows([make_stream(2, accumulation=2)], step, accumulation=2)
    assert one == two == accumulated


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own():
    stream = make_stream(4)  # 4 does not divide 6: batches run over the end of an epoch
    names = [name for step in range(3) for name in stream.batches(step, 0)[0].names]
    first, second = names[:6], names[6:]
    assert sorted(first) == sorted(second) == Store().names
    assert first != second


def test_a_step_can_be_drawn_again_at_any_time():
    stream = make_stream()
    before = stream.batches(5, 0)[0]
    stream.batches(0, 0)
    after = stream.batches(5, 0)[0]
    assert before.names == after.names
    assert torch.equal(before.noise, after.noise)
    assert torch.equal(before.times, after.times)


def test_variants_are_all_used():
    stream = make_stream()
    values = {int(stream.batches(step, 0)[0].latents[0].mean()) % 10 for step in range(20)}
    assert values == {0, 1}


def test_prior_images_ride_along_with_their_weight():
    sources = [Source("instance", Store(), 1.0), Source("class", Store(3), 0.5)]
    batch = make_stream(2, accumulation=2, sources=sources).batches(0, 0)[0]
    assert len(batch.names) == 4
    assert batch.weights.tolist() == [0.25, 0.25, 0.125, 0.125]


def test_noise_is_standard_normal_and_the_offset_is_shared_by_the_pixels_of_a_channel():
    plain = torch.cat([make_stream(6).batches(step, 0)[0].noise for step in range(50)])
    assert abs(plain.mean()) < 0.02
    assert abs(plain.std() - 1) < 0.02
    shifted = torch.cat([make_stream(6, noise_offset=0.5).batches(step, 0)[0].noise for step in range(50)])
    offset = (shifted - plain).flatten(2)
    assert torch.allclose(offset, offset[:, :, :1].expand_as(offset), atol=1e-6)
    assert abs(offset[:, :, 0].std() - 0.5) < 0.05


def test_another_seed_is_another_run():
    other = make_stream()
    other._seed = 1
    assert not torch.equal(other.batches(0, 0)[0].noise, make_stream().batches(0, 0)[0].noise)


def test_the_posterior_is_sampled():
    class Wide(Store):
        def latents(self, index, variant):
            return torch.zeros(3, 4, 4), torch.full((3, 4, 4), 2.0)

    latents = torch.cat(
        [make_stream(6, sources=[Source("i", Wide(), 1.0)]).batches(s, 0)[0].latents for s in range(50)]
    )
    assert abs(latents.std() - 2) < 0.05


# --- aspect-ratio buckets ---


@pytest.mark.parametrize("size", [1, 3, 4, 7, 50])
@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_arranged_order_shows_every_image_once(size, epoch):
    buckets = [0] * 17 + [1] * 9 + [2] * 2 + [3]
    order = permutation(len(buckets), 0, "order", epoch)
    arranged_order = arranged(order, buckets, size, epoch * len(buckets))
    assert sorted(arranged_order) == list(range(len(buckets)))


def mixed_steps(buckets, size, epochs):
    """Steps of the run that see more than one bucket."""
    run = []
    for epoch in range(epochs):
        order = permutation(len(buckets), 0, "order", epoch)
        run += [buckets[image] for image in arranged(order, buckets, size, epoch * len(buckets))]
    return sum(len(set(run[start : start + size])) > 1 for start in range(0, len(run), size)), -(-len(run) // size)


def test_nearly_all_steps_see_one_bucket():
    buckets = [0] * 101 + [1] * 53 + [2] * 27 + [3] * 5
    mixed, steps = mixed_steps(buckets, 4, 6)
    assert mixed <= 3 * 6 and steps == 279  # at most size·(buckets - 1) samples an epoch remain, and the two ends
    plain = [buckets[image] for epoch in range(6) for image in permutation(len(buckets), 0, "order", epoch)]
    assert sum(len(set(plain[start : start + 4])) > 1 for start in range(0, len(plain), 4)) > 3 * mixed


def test_order_of_whole_steps_is_random():
    buckets = [0] * 40 + [1] * 40
    firsts = [buckets[arranged(permutation(80, 0, "o", epoch), buckets, 4, 0)[0]] for epoch in range(20)]
    assert 3 < sum(firsts) < 17


class Shapes(Store):
    """Twelve images of two sizes; the pixels tell which image it is."""

    def __init__(self):
        super().__init__(12)
        self.buckets = [index % 3 == 0 for index in range(12)]

    def latents(self, index, variant):
        shape = (3, 4, 6) if self.buckets[index] else (3, 5, 4)
        return torch.full(shape, float(10 * index + variant)), torch.ones(shape)


def bucketed(*layout, **more):
    store = Shapes()
    return make_stream(
        *layout, sources=[Source("instance", store, 1.0, buckets=[int(b) for b in store.buckets])], **more
    )


def test_buckets_give_the_same_samples_however_steps_are_divided():
    for step in range(7):
        one = rows([bucketed(6)], step)
        two = rows([bucketed(3, 1, 0, 2), bucketed(3, 1, 1, 2)], step)
        accumulated = rows([bucketed(2, 3)], step, accumulation=3)
        assert one == two == accumulated and len(one) == 6


def test_a_mixed_micro_batch_is_split_and_its_weights_sum_to_one():
    stream, sizes = bucketed(5), set()
    for step in range(5):
        batches = stream.batches(step, 0)
        assert sum(len(batch.names) for batch in batches) == 5
        assert sum(float(batch.weights.sum()) for batch in batches) == pytest.approx(1)
        sizes.add(len(batches))
        for batch in batches:
            assert len(batch.names) == len(batch.latents) == len(batch.times) == len(batch.conditioning["n"])
    assert sizes == {1, 2}


def test_every_epoch_with_buckets_shows_every_image():
    stream = bucketed(5)
    names = [name for step in range(12) for batch in stream.batches(step, 0) for name in batch.names]
    for epoch in range(5):
        assert (
            sorted(names[12 * epoch : 12 * epoch + 12]) == sorted(Shapes().names) or epoch
        )  # order inside a step may differ
    counts = {name: names.count(name) for name in Shapes().names}
    assert set(counts.values()) == {5}


# --- captions ---


def test_captions_go_by_position_and_leave_the_other_draws_alone():
    asked = []

    def caption(text, *position):
        asked.append((text, *position))
        return ""

    seen = []
    source = Source("instance", Store(), 1.0, caption)
    stream = Stream(
        [source], OBJECTIVE, lambda c, _: seen.extend(c) or {"n": torch.zeros(len(c))}, Layout(2, 1, 0, 1), seed=0
    )
    batch = stream.batches(1, 0)[0]
    assert [(name, number) for _, name, number in asked] == [("instance", 2), ("instance", 3)] and seen == ["", ""]
    assert torch.equal(batch.noise, make_stream(2).batches(1, 0)[0].noise)


def test_samples_are_of_one_batch_in_whatever_order_the_cache_gives_what_belongs_to_them():
    class Shuffled(Store):
        def view(self, index, variant):
            both = {"picture": torch.zeros(1, 3, 2, 2), "place": torch.zeros(1, 2)}
            return dict(reversed(both.items())) if index % 2 else both

    stream = make_stream(4, sources=[Source("instance", Shuffled(), 1.0)])
    assert [len(batch.names) for batch in stream.batches(0, 0)] == [4]


def test_places_say_how_often_an_image_is_seen_in_an_epoch():
    source = Source("instance", Store(3), 1.0, places=[0, 1, 2, 2, 2])
    stream = make_stream(5, sources=[source])
    epochs = [stream.batches(step, 0)[0].names for step in range(4)]
    assert all(sorted(names) == ["0.png", "1.png", "2.png", "2.png", "2.png"] for names in epochs)
    assert len(set(epochs)) > 1


def test_places_with_buckets_keep_every_place():
    class Two(Store):
        def latents(self, index, variant):
            side = 4 if index < 2 else 2
            return torch.full((3, side, side), float(index)), torch.zeros(3, side, side)

    source = Source("instance", Two(4), 1.0, buckets=[0, 0, 1, 1], places=[0, 0, 1, 1, 2, 3])
    stream = make_stream(2, sources=[source])
    names = [name for step in range(3) for batch in stream.batches(step, 0) for name in batch.names]
    assert sorted(names) == ["0.png", "0.png", "1.png", "1.png", "2.png", "3.png"]


def test_shares_weigh_single_images():
    batch = make_stream(3, sources=[Source("instance", Store(3), 1.0, shares=[1.0, 0.5, 0.0])]).batches(0, 0)[0]
    weights = dict(zip(batch.names, batch.weights.tolist(), strict=True))
    assert weights == pytest.approx({"0.png": 1 / 3, "1.png": 1 / 6, "2.png": 0})


def test_masks_are_white_where_there_is_none():
    class Masked(Store):
        def mask(self, index, variant):
            return torch.full((1, 4, 4), 0.25) if index == 1 else None

    batch = make_stream(2, sources=[Source("instance", Masked(2), 1.0)]).batches(0, 0)[0]
    means = dict(zip(batch.names, batch.masks.flatten(1).mean(1).tolist(), strict=True))
    assert means == {"0.png": 1.0, "1.png": 0.25} and batch.masks.shape == (2, 1, 4, 4)
    assert make_stream().batches(0, 0)[0].masks is None


def test_what_is_read_ahead_is_what_would_have_been_read():
    ahead = make_stream(4, accumulation=2)
    for step in range(3):
        for micro in range(2):
            ahead.read_ahead(step, micro)
            [got], [expected] = ahead.batches(step, micro), make_stream(4, accumulation=2).batches(step, micro)
            assert got.names == expected.names
            for name in ("latents", "noise", "times", "weights"):
                assert torch.equal(getattr(got, name), getattr(expected, name))


def test_it_is_read_while_something_else_is_done(monkeypatch):
    stream, begun, go_on = make_stream(), threading.Event(), threading.Event()
    latents = stream.sources[0].store.latents

    def slow(index, variant):
        begun.set()
        assert go_on.wait(10)
        return latents(index, variant)

    monkeypatch.setattr(stream.sources[0].store, "latents", slow)
    stream.read_ahead(0, 0)
    assert begun.wait(10)
    go_on.set()
    assert stream.batches(0, 0)[0].names == make_stream().batches(0, 0)[0].names


def test_another_batch_than_the_one_that_was_read_ahead():
    stream = make_stream()
    stream.read_ahead(0, 0)
    for step in (2, 0):
        assert torch.equal(stream.batches(step, 0)[0].noise, make_stream().batches(step, 0)[0].noise)


def test_what_goes_wrong_ahead_is_told_where_the_batch_is_asked_for(monkeypatch):
    stream = make_stream()

    def gone(*_):
        raise UserError("removed")

    monkeypatch.setattr(stream.sources[0].store, "latents", gone)
    stream.read_ahead(0, 0)
    with pytest.raises(UserError, match="removed"):
        stream.batches(0, 0)
    monkeypatch.undo()
    assert stream.batches(0, 0)
