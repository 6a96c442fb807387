"""Which rows of samples.jsonl show the same thing, and what it is called."""

from __future__ import annotations

from typing import Any

from dreamlora.sampling.recorded import common_settings, motif_of, motifs_of, titles


def row(step: int, prompt: str, number: int = 0, **more: Any) -> dict[str, Any]:
    how = {"num_inference_steps": 4, "guidance_scale": 3.0, "scheduler": "DDIMScheduler"}
    return {"step": step, "prompt_index": number, "image_index": 0, "prompt": prompt, "seed": 42, **how, **more}


def test_prompts_alone_where_nothing_else_differs() -> None:
    motifs = motifs_of([row(0, "b", 1, seed=43), row(0, "a"), row(5, "a"), row(5, "b", 1, seed=43)])
    assert titles(motifs) == ["a", "b"]
    assert common_settings(motifs) == ("4 denoising steps", "guidance 3", "DDIMScheduler")


def test_seeds_where_a_prompt_has_several() -> None:
    motifs = motifs_of([row(0, "a"), row(0, "a", seed=43), row(0, "b", 1, seed=44)])
    assert titles(motifs) == ["a · seed 42", "a · seed 43", "b · seed 44"]


def test_settings_that_differ() -> None:
    motifs = motifs_of([row(0, "a"), row(5, "a", guidance_scale=1.0), row(5, "a", 1, negative_prompt="blurry")])
    assert titles(motifs) == ["a · guidance 1", 'a · guidance 3 · negative prompt "blurry"', "a · guidance 3"]
    assert common_settings(motifs) == ("4 denoising steps", "DDIMScheduler")


def test_the_last_drawn_come_first_by_their_last_numbers() -> None:
    rows = [row(0, "a"), row(0, "b", 1), row(5, "b", 0), row(5, "c", 1)]
    assert [motif.prompt for motif in motifs_of(rows[::-1])] == ["b", "c", "a"]


def test_a_row_without_settings_and_a_cell_with_them_in_words() -> None:
    bare = {"step": 0, "prompt_index": 0, "image_index": 0, "prompt": "a", "seed": 1}
    assert motif_of(bare).settings == ()
    assert (
        motif_of({**bare, "settings": list(motif_of(row(0, "a")).settings)}).settings == motif_of(row(0, "a")).settings
    )
