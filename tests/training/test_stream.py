"""The stream: what a sample is depends on its position alone."""

from types import SimpleNamespace

import pytest
import torch

from dreamlora.training.stream import Layout, Source, Stream


class Store:
    """Six images with two variants each."""

    def __init__(self, length=6):
        self.names = [f"{i}.png" for i in range(length)]
        self.captions = [f"caption {i}" for i in range(length)]

    def count(self, index):
        return 2

    def latents(self, index, variant):
        return torch.full((3, 4, 4), float(10 * index + variant)), torch.zeros(3, 4, 4)


OBJECTIVE = SimpleNamespace(draw_times=lambda uniforms: uniforms[:, 0])


def make_stream(batch_size=2, accumulation=1, rank=0, world=1, **more):
    sources = more.pop("sources", [Source("instance", Store(), 1.0)])
    layout = Layout(batch_size, accumulation, rank, world)
    return Stream(sources, OBJECTIVE, lambda captions: {"n": torch.zeros(len(captions))}, layout, seed=0, **more)


def rows(streams, step, accumulation=1):
    """Every sample of a step as (name, noise, time, latent), over all processes and micro-batches."""
    found = []
    for micro in range(accumulation):
        for stream in streams:
            batch = stream.batch(step, micro)
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
    names = [name for step in range(3) for name in stream.batch(step, 0).names]
    first, second = names[:6], names[6:]
    assert sorted(first) == sorted(second) == Store().names
    assert first != second


def test_a_step_can_be_drawn_again_at_any_time():
    stream = make_stream()
    before = stream.batch(5, 0)
    stream.batch(0, 0)
    after = stream.batch(5, 0)
    assert before.names == after.names
    assert torch.equal(before.noise, after.noise)
    assert torch.equal(before.times, after.times)


def test_variants_are_all_used():
    stream = make_stream()
    values = {int(stream.batch(step, 0).latents[0].mean()) % 10 for step in range(20)}
    assert values == {0, 1}


def test_prior_images_ride_along_with_their_weight():
    sources = [Source("instance", Store(), 1.0), Source("class", Store(3), 0.5)]
    batch = make_stream(2, accumulation=2, sources=sources).batch(0, 0)
    assert len(batch.names) == 4
    assert batch.weights.tolist() == [0.25, 0.25, 0.125, 0.125]


def test_noise_is_standard_normal_and_the_offset_is_shared_by_the_pixels_of_a_channel():
    plain = torch.cat([make_stream(6).batch(step, 0).noise for step in range(50)])
    assert abs(plain.mean()) < 0.02
    assert abs(plain.std() - 1) < 0.02
    shifted = torch.cat([make_stream(6, noise_offset=0.5).batch(step, 0).noise for step in range(50)])
    offset = (shifted - plain).flatten(2)
    assert torch.allclose(offset, offset[:, :, :1].expand_as(offset), atol=1e-6)
    assert abs(offset[:, :, 0].std() - 0.5) < 0.05


def test_another_seed_is_another_run():
    other = make_stream()
    other._seed = 1
    assert not torch.equal(other.batch(0, 0).noise, make_stream().batch(0, 0).noise)


def test_the_posterior_is_sampled():
    class Wide(Store):
        def latents(self, index, variant):
            return torch.zeros(3, 4, 4), torch.full((3, 4, 4), 2.0)

    latents = torch.cat([make_stream(6, sources=[Source("i", Wide(), 1.0)]).batch(s, 0).latents for s in range(50)])
    assert abs(latents.std() - 2) < 0.05
