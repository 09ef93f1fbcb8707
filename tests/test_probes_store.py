"""Stores resume, grow, refuse what is not theirs, and say what is damaged."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from tiny import hooked, tokenizer, words

from probes import HookedModel, Site, capture
from probes.prompts import Template
from probes.store import Identity, Store

# the short ones run last and have more in common than all: a plan made for them alone is another
PROMPTS = [*words(6, seed=1, shortest=7), *(f"w1 w2 w3 w{i}" for i in range(10, 16))]
SITES = "1-2.resid_post"


class Crash(BaseException):
    """Like a kill: nothing that handles errors may see it."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[Site, ...]]]:
    """(tokens, sites) of every read of the tiny Llama."""
    engine = hooked().engine
    seen: list[tuple[int, tuple[Site, ...]]] = []
    read = engine.read

    def counting(batch: Any, sites: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((int(batch.mask.sum()), tuple(sites)))
        return read(batch, sites, *args, **kwargs)

    monkeypatch.setattr(engine, "read", counting)
    return seen


def run(folder: Path, prompts: list[str] = PROMPTS, sites: Any = SITES, **options: Any) -> Any:
    return capture(hooked(), prompts, sites, store=folder, batch_size=3, **options)


def crash_after(folder: Path, n: int) -> None:
    """Capture until the n-th write is through."""
    done = 0
    write = Store.write

    def some(self: Store, *args: Any) -> None:
        nonlocal done
        write(self, *args)
        done += 1
        if done == n:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", some)
        with pytest.raises(Crash):
            run(folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def lines(folder: Path) -> list[dict[str, Any]]:
    text = (folder / "manifest.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def message(act: Callable[[], Any], kind: type[Exception] = ValueError) -> str:
    with pytest.raises(kind) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- resuming and growing ---------------------------------------------------------------------


def test_a_store_gives_what_memory_gives(tmp_path: Path) -> None:
    for rule in ("last", "all", "mean:content"):
        kept = capture(hooked(), PROMPTS, SITES, rule, store=tmp_path / rule, batch_size=3)
        free = capture(hooked(), PROMPTS, SITES, rule, batch_size=3)
        assert kept.counts == free.counts
        for site in kept.sites:
            assert torch.equal(kept.rows(site)[0], free.rows(site)[0])


def test_a_finished_store_computes_nothing(tmp_path: Path, reads: list) -> None:
    first = run(tmp_path)
    before = contents(tmp_path)
    assert reads
    reads.clear()
    second = run(tmp_path)
    assert not reads
    assert contents(tmp_path) == before
    assert torch.equal(first["1.resid_post"], second["1.resid_post"])
    backwards = run(tmp_path, PROMPTS[::-1] + PROMPTS[:2])
    assert not reads
    expected = torch.cat([first["2.resid_post"].flip(0), first["2.resid_post"][:2]])
    assert torch.equal(backwards["2.resid_post"], expected)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_crashed_run_computes_the_rest_and_ends_in_the_same_bytes(
    n: int, tmp_path: Path, reads: list
) -> None:
    run(tmp_path / "whole")
    whole = [tokens for tokens, _ in reads]
    assert len(whole) >= 4
    reads.clear()
    crash_after(tmp_path / "crashed", n)
    reads.clear()
    run(tmp_path / "crashed")
    assert [tokens for tokens, _ in reads] == whole[n:]
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def test_a_new_site_is_computed_alone(tmp_path: Path, reads: list) -> None:
    run(tmp_path)
    n = len(lines(tmp_path))
    reads.clear()
    acts = run(tmp_path, sites=["0-2.resid_post", "1.head_out"])
    new = (Site(0, "resid_post"), Site(1, "head_out"))
    assert {sites for _, sites in reads} == {new}
    assert len(lines(tmp_path)) == 2 * n
    free = capture(hooked(), PROMPTS, ["0-2.resid_post", "1.head_out"], batch_size=3)
    for site in acts.sites:
        assert torch.equal(acts[site], free[site])


def test_adding_sites_survives_a_crash_to_the_byte(tmp_path: Path) -> None:
    sites = ["0-2.resid_post"]
    for name in ("whole", "crashed"):
        run(tmp_path / name)
    run(tmp_path / "whole", sites=sites)
    written = 0
    write = Store.write

    def some(self: Store, *args: Any) -> None:
        nonlocal written
        write(self, *args)
        written += 1
        if written == 2:
            raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "write", some)
        with pytest.raises(Crash):
            run(tmp_path / "crashed", sites=sites)
    run(tmp_path / "crashed", sites=sites)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "whole")


def test_new_prompts_are_computed_alone(tmp_path: Path, reads: list) -> None:
    run(tmp_path, PROMPTS[:7])
    held = {p for line in lines(tmp_path) for p in line["prompts"]}
    reads.clear()
    acts = run(tmp_path)
    cells = [p for line in lines(tmp_path) for p in line["prompts"]]
    assert len(cells) == len(set(cells)) == 12
    rendered = hooked().template.render_all(PROMPTS)
    assert {r.key for r in rendered[:7]} == held
    assert sum(tokens for tokens, _ in reads) < sum(len(r.ids) for r in rendered[7:])
    free = capture(hooked(), PROMPTS, SITES)
    torch.testing.assert_close(acts["2.resid_post"], free["2.resid_post"], rtol=1e-5, atol=1e-5)


def test_new_prompts_and_sites_at_once(tmp_path: Path, reads: list) -> None:
    run(tmp_path, PROMPTS[:7], "1.resid_post")
    reads.clear()
    acts = run(tmp_path, PROMPTS, "0-1.resid_post")
    read = {sites for _, sites in reads}
    assert read == {(Site(0, "resid_post"),), (Site(0, "resid_post"), Site(1, "resid_post"))}
    cells = [(p, s) for line in lines(tmp_path) for p in line["prompts"] for s in line["sites"]]
    assert len(cells) == len(set(cells)) == 24
    free = capture(hooked(), PROMPTS, "0-1.resid_post")
    for site in acts.sites:
        torch.testing.assert_close(acts[site], free[site], rtol=1e-5, atol=1e-5)


def test_answers_make_other_prompts(tmp_path: Path, reads: list) -> None:
    run(tmp_path, PROMPTS[:3])
    reads.clear()
    run(tmp_path, PROMPTS[:3], answers=["w1", "w2", "w3"])
    assert reads


# ---- damage -----------------------------------------------------------------------------------


def test_a_damaged_shard_is_refused_and_can_be_replaced(tmp_path: Path, reads: list) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    shard = tmp_path / "shards" / f"{lines(tmp_path)[1]['name']}.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1  # one bit of one number
    shard.write_bytes(bytes(data))
    said = message(lambda: run(tmp_path))
    assert "is damaged: its content does not match the manifest. Delete the file" in said
    assert str(shard) in said
    shard.unlink()
    reads.clear()
    run(tmp_path)
    assert len(reads) == 1
    after = contents(tmp_path)
    assert {k: v for k, v in after.items() if k != "manifest.jsonl"} == {
        k: v for k, v in before.items() if k != "manifest.jsonl"
    }


def test_a_missing_shard_is_computed_anew(tmp_path: Path, reads: list) -> None:
    first = run(tmp_path)
    for line in lines(tmp_path)[:2]:
        (tmp_path / "shards" / f"{line['name']}.safetensors").unlink()
    reads.clear()
    second = run(tmp_path)
    assert len(reads) == 2
    assert torch.equal(first["1.resid_post"], second["1.resid_post"])


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_last_line_is_dropped(cut: int, tmp_path: Path, reads: list) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_bytes(manifest.read_bytes()[:-cut])
    reads.clear()
    run(tmp_path)
    assert len(reads) == 1
    assert contents(tmp_path) == before


def test_a_damaged_line_is_refused_with_its_number(tmp_path: Path, reads: list) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    good = manifest.read_text().splitlines()
    for bad in ("{", "[1, 2]", '{"name": "x"}', ""):
        manifest.write_text("\n".join([*good[:1], bad, *good[2:]]) + "\n")
        assert f"line 2 of {manifest} is damaged: delete that line and run again" in (
            message(lambda: run(tmp_path))
        )
    manifest.write_text("\n".join([*good[:1], *good[2:]]) + "\n")
    reads.clear()
    run(tmp_path)
    assert len(reads) == 1
    assert contents(tmp_path).keys() == before.keys()


def test_leftover_temporaries_are_cleared(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    (tmp_path / "shards" / ".abc.safetensors.123.tmp").write_bytes(b"half")
    (tmp_path / ".store.json.123.tmp").write_bytes(b"half")
    run(tmp_path)
    assert contents(tmp_path) == before


def test_a_damaged_header_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    header = tmp_path / "store.json"
    good = json.loads(header.read_text())
    header.write_text("{")
    assert "store.json is damaged" in message(lambda: run(tmp_path))
    header.write_text("[]")
    assert "is no store of activations" in message(lambda: run(tmp_path))
    header.write_text(json.dumps({**good, "format": 7}))
    assert "is a store of format 7, this version reads 1" in message(lambda: run(tmp_path))


# ---- what is not ours -------------------------------------------------------------------------


def test_another_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    before = contents(tmp_path)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 1e-3
    other = HookedModel(model, tokenizer(), name="other")
    said = message(lambda: capture(other, PROMPTS, SITES, store=tmp_path))
    assert "holds activations of another model (model 'tiny llama'), asked for fingerprint" in said
    assert "of 'other': give another folder" in said
    assert contents(tmp_path) == before


def test_another_template_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    plain = HookedModel(build("llama"), tokenizer(), template="none")
    assert plain.fingerprint == hooked().fingerprint
    said = message(lambda: capture(plain, PROMPTS, SITES, store=tmp_path))
    assert "holds activations of another chat template" in said


def test_other_positions_are_refused(tmp_path: Path) -> None:
    run(tmp_path)
    said = message(lambda: capture(hooked(), PROMPTS, SITES, "mean:all", store=tmp_path))
    assert "holds activations of positions 'last'" in said
    assert "asked for positions 'mean:all'" in said


def identity(**changes: str) -> Identity:
    given = dict.fromkeys(("fingerprint", "template", "positions", "engine", "dtype", "model"), "a")
    return Identity(**{**given, **changes})


@pytest.mark.parametrize("field", ["fingerprint", "template", "positions", "engine", "dtype"])
def test_every_field_of_the_identity_counts(field: str, tmp_path: Path) -> None:
    Store(tmp_path, identity())
    Store(tmp_path, identity(model="called otherwise"))
    said = message(lambda: Store(tmp_path, identity(**{field: "b"})))
    assert f"asked for {field} 'b'" in said


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    said = message(lambda: run(tmp_path))
    assert "is not empty and holds no store.json: give an empty folder" in said
    assert contents(tmp_path) == {"thesis.txt": b"mine"}


def test_what_was_not_captured_is_a_sentence(tmp_path: Path) -> None:
    run(tmp_path)
    store = Store(tmp_path, identity_of(tmp_path))
    with pytest.raises(KeyError, match="has no 0.resid_post for 1 of 1 prompts: run the capture"):
        store.read("0.resid_post", ["x"])


def identity_of(folder: Path) -> Identity:
    header = json.loads((folder / "store.json").read_text())
    return Identity(**{key: value for key, value in header.items() if key != "format"})


# ---- two at a time ----------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    run(tmp_path)
    other = Store(tmp_path, identity_of(tmp_path))
    with other.writing():
        with pytest.raises(RuntimeError, match="another process is writing to .*: wait for it"):
            run(tmp_path)
    run(tmp_path)


def test_opening_a_store_leaves_a_line_that_is_being_written(tmp_path: Path) -> None:
    run(tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    whole = manifest.read_bytes()
    half = len(whole) - 30
    manifest.write_bytes(whole[:half])
    with manifest.open("ab") as writer:  # the other process, in the middle of its line
        n = len(Store(tmp_path, identity_of(tmp_path)).shards)
        writer.write(whole[half:])
    assert manifest.read_bytes() == whole
    assert n == whole.count(b"\n") - 1


def test_what_others_finish_while_we_wait_is_not_done_again(tmp_path: Path, reads: list) -> None:
    early = Store(tmp_path, identity_of_run())
    run(tmp_path)
    with early.writing():
        assert len(early.shards) == len(lines(tmp_path))


def identity_of_run() -> Identity:
    model = hooked()
    template: Template = model.template
    return Identity(
        model.fingerprint, template.hash, "last", "transformers", "float32", "tiny llama"
    )


# ---- values -----------------------------------------------------------------------------------


def test_bfloat16_comes_back_as_it_went(tmp_path: Path) -> None:
    model = HookedModel(build("llama").bfloat16(), tokenizer())
    kept = capture(model, PROMPTS, ["all.resid_post", "1.head_out"], store=tmp_path)
    free = capture(model, PROMPTS, ["all.resid_post", "1.head_out"])
    for site in kept.sites:
        assert kept[site].dtype == torch.bfloat16
        assert torch.equal(kept[site], free[site])
    assert kept["1.head_out"].shape == (12, 4, 16)
    again = capture(model, PROMPTS, "1.resid_post", store=tmp_path)
    assert torch.equal(again["1.resid_post"], free["1.resid_post"])


def test_a_site_is_read_without_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    """Reading one of many sites must not pull the whole store through memory each time."""
    acts = run(tmp_path, sites="all.resid_post")
    acts["0.resid_post"]
    opened: list[Path] = []
    original = Path.open

    def counting(self: Path, *args: Any, **kwargs: Any) -> Any:
        opened.append(self)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", counting)
    acts["1.resid_post"]
    assert not [path for path in opened if path.suffix == ".safetensors"]  # hashed once already


def test_writes_are_synced_before_the_manifest_names_them(tmp_path: Path, monkeypatch: Any) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename " + Path(target).name)
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    run(tmp_path)
    name = f"{lines(tmp_path)[0]['name']}.safetensors"
    at = events.index(f"rename {name}")
    assert events[at - 1].startswith(f"sync .{name}.")
    assert events[at + 1 : at + 3] == ["sync shards", "sync manifest.jsonl"]
