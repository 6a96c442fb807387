"""The evaluation loss: frozen, spread, split and equal to a direct computation."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save, save_file

from dreamlora.errors import UserError
from dreamlora.eval_loss.evalset import EvalSet, Measured, build_eval_set, build_final_set, evaluate_loss
from tests.fuzzing import as_json, changed, damaged, fuzzed, harmless


class LinearPath:
    """x_t = (1 - t) x + t n, target n - x."""

    def spread_times(self, positions):
        return positions

    def corrupt(self, latents, noise, times):
        t = times[:, None, None, None]
        return (1 - t) * latents + t * noise

    def target(self, latents, noise, times):
        return noise - latents


def make_set(images=4, seed=1, names=None):
    latents = torch.randn(images, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    captions = [f"caption {i}" for i in range(images)]
    return build_eval_set(
        latents, captions, names or [f"id{i}" for i in range(images)], LinearPath(), seed=seed, model_id="m"
    )


def conditioning(captions, views):
    return {"number": torch.tensor([float(caption.split()[-1]) for caption in captions])}


def predict(noisy, times, condition):
    return 0.5 * noisy + times[:, None, None, None] + condition["number"][:, None, None, None]


def losses(items, **more):
    model = Measured(predict, LinearPath(), conditioning, torch.device("cpu"))
    return evaluate_loss(model, items, **{"batch_size": 8, **more})


def test_every_item_is_the_mean_squared_error_of_its_image_time_and_noise():
    items = make_set()
    values = losses(items)
    for k in (0, 5, 63):
        i, t = items.image[k], items.times[k]
        x, n = items.latents[i], items.noise([k])[0]
        expected = ((0.5 * ((1 - t) * x + t * n) + t + i) - (n - x)).pow(2).mean()
        assert abs(values[k] - expected.item()) < 1e-6


def test_times_cover_the_schedule_evenly_and_differ_from_image_to_image():
    items = make_set(images=4)
    assert len(items.times) == 64
    assert torch.equal(torch.sort(items.position).values, (torch.arange(64) + 0.5) / 64)
    assert len(make_set(images=1).times) == 64
    assert len(make_set(images=16).times) == 16 * 4
    assert len(make_set(images=8).times) == 8 * 8


def test_noise_belongs_to_the_item_not_to_the_batch_or_the_other_images():
    whole, fewer = make_set(4), make_set(2, names=["id0", "id1"])
    assert torch.equal(whole.noise([0, 1, 2])[2], whole.noise([2])[0])
    assert torch.equal(whole.noise([0])[0], fewer.noise([0])[0])
    assert not torch.equal(whole.noise([0])[0], whole.noise([1])[0])


def test_batch_size_and_processes_do_not_change_the_values():
    items = make_set()
    reference = losses(items)
    by_one = losses(items, batch_size=1)
    assert len(reference) == 64 and by_one == pytest.approx(reference, abs=1e-5)
    for rank in (0, 1):  # alone here: what was measured elsewhere is gathered in tests/evaluation/test_metric.py
        assert losses(items, rank=rank, world=2) == pytest.approx(reference[rank::2], abs=1e-5)


def test_the_id_tells_different_sets_apart():
    assert make_set().id == make_set().id
    assert make_set().id != make_set(seed=2).id
    assert make_set().id != make_set(names=["a", "b", "c", "d"]).id


def test_measuring_leaves_the_global_random_state_alone():
    before = torch.get_rng_state()
    losses(make_set())
    assert torch.equal(before, torch.get_rng_state())


def make_final(curve, n_items=256, seed=1):
    names = [f"id{i}" for i in range(len(curve.captions))]
    return build_final_set(curve, names, LinearPath(), seed=seed, n_items=n_items)


@pytest.mark.parametrize(("images", "times"), [(8, 16), (16, 8), (1, 128), (3, 43)])
def test_the_final_set_has_two_noises_at_every_time_and_at_least_256_items(images, times):
    curve = make_set(images)
    final = make_final(curve)
    assert len(final.times) == images * times * 2 >= 256
    expected = (torch.arange(images * times) + 0.5) / (images * times)
    assert torch.allclose(torch.sort(final.position).values, expected.repeat_interleave(2))
    assert len({*final.noise_keys, *curve.noise_keys}) == len(final.times) + len(curve.times), "no noise twice"
    pair = final.noise([0, 1])
    assert final.position[0] == final.position[1] and not torch.equal(pair[0], pair[1])
    assert final.id != curve.id and make_final(curve).id == final.id != make_final(curve, seed=2).id


def test_a_small_final_set_still_covers_the_schedule():
    assert len(make_final(make_set(4), n_items=10).times) == 4 * 4
    assert len(make_final(make_set(4), n_items=64).times) == 4 * 8 * 2


def test_a_stored_set_gives_the_same_losses(tmp_path: Path):
    for items in (make_set(), make_final(make_set())):
        items.save(tmp_path / "set.json")
        again = EvalSet.load(tmp_path / "set.json")
        assert (again.id, again.captions, again.model_id) == (items.id, items.captions, "m")
        assert losses(again) == losses(items)


def test_masks_weigh_the_places_and_belong_to_the_identity(tmp_path: Path):
    items = make_set()
    left = torch.zeros(4, 1, 4, 4)
    left[..., :2] = 1
    masked = items.of_images(left, {})
    assert items.of_images(None, {}) is items and len({items.id, masked.id, items.of_images(1 - left, {}).id}) == 3
    assert build_final_set(masked, list("abcd"), LinearPath(), seed=1).masks is left
    item = 5
    image, time = masked.latents[masked.image[item]], masked.times[item]
    noise = masked.noise([item])[0]
    prediction = predict(
        ((1 - time) * image + time * noise)[None],
        time[None],
        conditioning([masked.captions[image_of(masked, item)]], {}),
    )
    error = (prediction[0] - (noise - image)).square()[:, :, :2].mean()
    assert losses(masked)[item] == pytest.approx(float(error), rel=1e-5)
    masked.save(tmp_path / "set.json")
    again = EvalSet.load(tmp_path / "set.json")
    assert again.masks is not None and torch.equal(again.masks, left) and losses(again) == losses(masked)


def image_of(items: EvalSet, item: int) -> int:
    return int(items.image[item])


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("evalset") / "set.json"
    make_set().save(file)
    return file


ODD_TENSORS = {
    "latents of other images": lambda t: {**t, "latents": t["latents"][:2]},
    "latents in half precision": lambda t: {**t, "latents": t["latents"].half()},
    "flat latents": lambda t: {**t, "latents": t["latents"].flatten()},
    "no places": lambda t: {**t, "latents": t["latents"][..., :0]},
    "latents that are not finite": lambda t: {**t, "latents": t["latents"] * torch.nan},
    "images that there are not": lambda t: {**t, "image": t["image"] + 1},
    "images below 0": lambda t: {**t, "image": t["image"] - 1},
    "images as numbers with a point": lambda t: {**t, "image": t["image"].float()},
    "fewer times": lambda t: {**t, "times": t["times"][:-1]},
    "times below 0": lambda t: {**t, "times": -t["times"]},
    "complex times": lambda t: {**t, "times": t["times"].to(torch.complex64)},
    "positions above 1": lambda t: {**t, "position": t["position"] + 1},
    "masks of other places": lambda t: {**t, "masks": torch.ones(4, 1, 1, 1)},
    "masks above 1": lambda t: {**t, "masks": torch.full((4, 1, 4, 4), 2.0)},
    "one tensor more": lambda t: {**t, "x": torch.ones(1)},
    "one tensor less": lambda t: {name: tensor for name, tensor in t.items() if name != "position"},
}


@pytest.mark.parametrize("change", ODD_TENSORS.values(), ids=ODD_TENSORS)
def test_tensors_that_no_set_has_are_refused(change, stored: Path, tmp_path: Path) -> None:
    (tmp_path / "set.json").write_bytes(stored.read_bytes())
    tensors = change(load_file(stored.with_suffix(".safetensors")))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "set.safetensors")
    with pytest.raises(UserError, match=r"cannot read .*set\.safetensors"):
        EvalSet.load(tmp_path / "set.json")


ABOUT = {
    "no captions": {"captions": []},
    "captions that are numbers": {"captions": [1, 2, 3, 4]},
    "a huge caption": {"captions": ["x" * 10**6, "b", "c", "d"]},
    "keys that are numbers": {"noise_keys": [1] * 64},
    "fewer keys": {"noise_keys": ["a"]},
    "a model that is none": {"model_id": None},
    "another id": {"evalset_id": "0" * 16},
    "a huge id": {"evalset_id": "0" * 10**6},
}


@pytest.mark.parametrize("change", ABOUT.values(), ids=ABOUT)
def test_what_no_set_says_of_itself_is_refused(change, stored: Path, tmp_path: Path) -> None:
    (tmp_path / "set.safetensors").write_bytes(stored.with_suffix(".safetensors").read_bytes())
    about = json.loads(stored.read_text(encoding="utf-8"))
    (tmp_path / "set.json").write_text(json.dumps({**about, **change}), encoding="utf-8")
    with pytest.raises(UserError) as refusal:
        EvalSet.load(tmp_path / "set.json")
    assert len(str(refusal.value)) < 600


def test_a_file_that_is_missing_or_lies_elsewhere(stored: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no set\.json"):
        EvalSet.load(tmp_path / "set.json")
    (tmp_path / "set.json").symlink_to(stored)
    with pytest.raises(UserError, match=r"no set\.safetensors"):
        EvalSet.load(tmp_path / "set.json")
    (tmp_path / "set.safetensors").symlink_to(stored.with_suffix(".safetensors"))
    assert EvalSet.load(tmp_path / "set.json").id == make_set().id, "links that a person placed are followed"
    with pytest.raises(UserError, match="link leads out"):
        EvalSet.load(tmp_path / "set.json", inside=tmp_path)


def test_times_of_another_schedule_do_not_suit() -> None:
    class Hasty(LinearPath):
        def spread_times(self, positions):
            return positions * 2

    assert make_set().suits(LinearPath()) and not make_set().suits(Hasty())


ABOUT_SOUND = {"evalset_id": make_set().id, "model_id": "m"}
ABOUT_SOUND |= {"captions": list(make_set().captions), "noise_keys": list(make_set().noise_keys)}
TENSORS = save({name: getattr(make_set(), name).clone() for name in ("latents", "image", "times", "position")})


@fuzzed
@given(
    st.one_of(damaged(as_json(ABOUT_SOUND)), changed(ABOUT_SOUND).map(as_json), st.just(as_json(ABOUT_SOUND))),
    st.one_of(damaged(TENSORS), st.just(TENSORS)),
)
def test_fuzz_evalset(tmp_path_factory: pytest.TempPathFactory, about: bytes, tensors: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "fuzzed.json"
    file.write_bytes(about)
    file.with_suffix(".safetensors").write_bytes(tensors)
    harmless(lambda: EvalSet.load(file))
