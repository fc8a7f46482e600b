"""Export and import: real safetensors, the same bytes again, and files that lie are refused."""

from __future__ import annotations

import json
import shutil
import struct
import tracemalloc
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from edje.errors import EdjeError, RequestError, StoreError
from edje.runtime.store import TokenStore
from edje.runtime.store import shards as exchange_module
from edje.runtime.store.format import StoreLayout
from edje.runtime.store.shard import ShardError, ShardReader, ShardWriter, read_header
from edje.runtime.store.shards import export_store, import_store
from edje.tokens import quantize_tokens
from store_bytes import flip

ENCODER = "sha256:tower"
SIZES = {"num_tokens": 4, "hidden": 6, "fingerprint_encoder": ENCODER}
IDS = ["b", "a/c.png", "é", "x\ny", "a"]
RECORD_BYTES = 4 * 6 * 2


def tokens_of(count: int, seed: int = 0) -> np.ndarray:
    """Return float16 [count, 4, 6]."""
    return np.random.default_rng(seed).standard_normal((count, 4, 6)).astype(np.float16)


def make_store(path: Path, dtype: str = "float16", ids: list[str] = IDS) -> Path:
    """A store of `ids`, the tokens of `tokens_of`, in segments of two records."""
    with TokenStore.create(path, dtype=dtype, segment_bytes=4 * 4096, **SIZES) as store:
        store.append(ids, tokens_of(len(ids)))
    return path


def export(path: Path, out: Path, **options: Any) -> Any:
    with TokenStore.open(path) as store:
        return export_store(store, out, **options)


def content(path: Path) -> tuple[list[str], bytes, bytes]:
    """Return the ids of a store in order, and the bytes of all tokens and scales."""
    with TokenStore.open(path) as store:
        ids = store.ids()
        shape = (len(ids), *store.record_shape)
        tokens = np.empty(shape, store.layout.dtype)
        scales = np.empty(shape[:2], np.float16) if store.layout.dtype == "int8" else None
        store.read(store.rows(ids), tokens, scales)
    return ids, tokens.tobytes(), b"" if scales is None else scales.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_the_safetensors_library_reads_the_shards(tmp_path: Path, dtype: str) -> None:
    report = export(
        make_store(tmp_path / "s", dtype), tmp_path / "out", shard_bytes=2 * RECORD_BYTES
    )
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    per_shard = 2 if dtype == "float16" else 3
    num_shards = -(-5 // per_shard)
    shards = [f"tokens-{n:05d}-of-{num_shards:05d}.safetensors" for n in range(num_shards)]
    assert names == ["index.json", *shards]
    assert (report.num_records, report.num_shards) == (5, num_shards)
    assert report.total_bytes == sum((tmp_path / "out" / name).stat().st_size for name in shards)
    values, scales = quantize_tokens(tokens_of(5))
    expected = tokens_of(5) if dtype == "float16" else values
    for number, name in enumerate(shards):
        part = slice(number * per_shard, (number + 1) * per_shard)
        tensors = load_file(tmp_path / "out" / name)
        assert np.array_equal(tensors["visual_tokens"], expected[part])
        assert tensors["visual_tokens"].dtype == expected.dtype
        if dtype == "int8":
            assert np.array_equal(tensors["visual_scales"], scales[part])
        text, ends = tensors["ids"].tobytes(), [0, *tensors["id_ends"].tolist()]
        found = [text[a:b].decode() for a, b in pairwise(ends)]
        assert found == IDS[part]
        with safe_open(tmp_path / "out" / name, "np") as opened:
            assert opened.metadata() == {
                "format": "edje-visual-tokens",
                "format_version": "1",
                "fingerprint_encoder": ENCODER,
                "num_tokens": "4",
                "hidden": "6",
                "dtype": dtype,
            }


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_exported_comes_back_byte_for_byte(tmp_path: Path, dtype: str) -> None:
    source = make_store(tmp_path / "s", dtype)
    for name in ("out", "t"):
        (tmp_path / name).mkdir()  # an empty folder is as good as none
    export(source, tmp_path / "out", shard_bytes=1)
    report = import_store(tmp_path / "out", tmp_path / "t")
    assert (report.num_added, report.num_present, report.num_shards) == (5, 0, 5)
    assert content(tmp_path / "t") == content(source)
    with TokenStore.open(tmp_path / "t") as store:
        assert store.fingerprint_encoder == ENCODER
    export(tmp_path / "t", tmp_path / "again", shard_bytes=1)
    for path in (tmp_path / "out").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=9),
        unique=True,
        min_size=1,
        max_size=9,
    ),
    gone=st.integers(0, 8),
    shard_records=st.integers(1, 9),
)
def test_any_ids_and_shard_sizes_come_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], gone: int, shard_records: int
) -> None:
    folder = tmp_path_factory.mktemp("round")
    source = make_store(folder / "s", ids=texts)
    with TokenStore.open(source, mode="a") as store:
        store.delete(texts[:gone])
    export(source, folder / "out", shard_bytes=shard_records * RECORD_BYTES)
    if texts[gone:]:
        import_store(folder / "out", folder / "t")
        assert content(folder / "t") == content(source)
        assert content(source)[0] == texts[gone:]
    shutil.rmtree(folder)


def test_an_import_again_adds_what_is_missing(tmp_path: Path) -> None:
    source = make_store(tmp_path / "s")
    export(source, tmp_path / "out", shard_bytes=2 * RECORD_BYTES)
    with TokenStore.create(tmp_path / "t", **SIZES) as store:
        store.append(IDS[1:2], tokens_of(5)[1:2])
    seen: list[tuple[int, int]] = []
    report = import_store(
        tmp_path / "out", tmp_path / "t", progress=lambda done, total: seen.append((done, total))
    )
    assert (report.num_added, report.num_present) == (4, 1)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    ids, tokens, _ = content(tmp_path / "t")
    assert ids == [IDS[1], IDS[0], *IDS[2:]]
    assert tokens == tokens_of(5)[[1, 0, 2, 3, 4]].tobytes()
    assert import_store(tmp_path / "out", tmp_path / "t").num_added == 0


def test_float16_shards_are_quantised_into_an_int8_store_but_never_back(tmp_path: Path) -> None:
    export(make_store(tmp_path / "s"), tmp_path / "out")
    import_store(tmp_path / "out", tmp_path / "t", dtype="int8")
    values, scales = quantize_tokens(tokens_of(5))
    assert content(tmp_path / "t") == (IDS, values.tobytes(), scales.tobytes())
    export(tmp_path / "t", tmp_path / "out8")
    with pytest.raises(StoreError, match="float16 store"):
        import_store(tmp_path / "out8", make_store(tmp_path / "u", ids=["z"]))
    with pytest.raises(StoreError, match="float16 store"):
        import_store(tmp_path / "out8", tmp_path / "v", dtype="float16")
    assert not (tmp_path / "v").exists()


def test_another_encoders_store_is_refused_with_both_names(tmp_path: Path) -> None:
    export(make_store(tmp_path / "s"), tmp_path / "out")
    other = {**SIZES, "hidden": 8, "fingerprint_encoder": "sha256:other"}
    TokenStore.create(tmp_path / "t", **other).close()
    with pytest.raises(StoreError) as caught:
        import_store(tmp_path / "out", tmp_path / "t")
    assert caught.value.faults == (
        f"fingerprint_encoder: the store has sha256:other, the shards have {ENCODER}",
        "hidden: the store has 8, the shards have 6",
    )


def foreign_ids(ids: list[str]) -> np.ndarray:
    """Return uint8 [n, width] as others may write them."""
    padded = np.array([image_id.encode() for image_id in ids])
    return padded.view(np.uint8).reshape(len(ids), -1)


def test_shards_of_others_need_tokens_ids_and_the_name_of_the_encoder(tmp_path: Path) -> None:
    shards = tmp_path / "theirs"
    shards.mkdir()
    tensors = {"visual_tokens": tokens_of(5), "ids": foreign_ids(IDS), "extra": np.zeros(3)}
    save_file(tensors, shards / "a.safetensors")
    with pytest.raises(RequestError, match=r"a\.safetensors: says nothing of the encoder"):
        import_store(shards, tmp_path / "t")
    assert not (tmp_path / "t").exists()
    import_store(shards, tmp_path / "t", fingerprint_encoder=ENCODER)
    assert content(tmp_path / "t") == (IDS, tokens_of(5).tobytes(), b"")
    import_store(shards / "a.safetensors", tmp_path / "u", fingerprint_encoder=ENCODER)
    assert content(tmp_path / "u")[0] == IDS
    with pytest.raises(RequestError, match="there is no"):
        import_store(tmp_path / "nowhere", tmp_path / "v")
    with pytest.raises(RequestError, match=r"holds no \.safetensors"):
        import_store(tmp_path / "t", tmp_path / "v")


def test_shards_that_disagree_are_refused_together(tmp_path: Path) -> None:
    shards = tmp_path / "theirs"
    shards.mkdir()
    meta = {"fingerprint_encoder": ENCODER}
    for name, hidden in (("a", 6), ("b", 7)):
        tokens = np.zeros((1, 4, hidden), np.float16)
        save_file(
            {"visual_tokens": tokens, "ids": foreign_ids([name])},
            shards / f"{name}.safetensors",
            meta,
        )
    save_file({"visual_tokens": np.zeros((1, 4, 6), np.float32)}, shards / "c.safetensors", meta)
    (shards / "d.safetensors").write_bytes(b"")
    with pytest.raises(RequestError) as caught:
        import_store(shards, tmp_path / "t")
    assert [fault.split(":")[0] for fault in caught.value.faults] == [
        "c.safetensors",
        "d.safetensors",
    ]
    (shards / "c.safetensors").unlink()
    (shards / "d.safetensors").unlink()
    with pytest.raises(RequestError) as caught:
        import_store(shards, tmp_path / "t")
    assert [fault.split(",")[0] for fault in caught.value.faults] == [
        "a.safetensors: float16 [4",
        "b.safetensors: float16 [4",
    ]


@pytest.mark.parametrize("tensor", ["id_ends", "visual_tokens", "ids"])
def test_a_damaged_shard_keeps_out_alone(tmp_path: Path, tensor: str) -> None:
    source = make_store(tmp_path / "s")
    export(source, tmp_path / "out", shard_bytes=2 * RECORD_BYTES)
    shard = tmp_path / "out/tokens-00001-of-00003.safetensors"
    place = read_header(shard).tensors[tensor]
    flip(shard, place.offset + place.num_bytes - 1)
    with pytest.raises(StoreError) as caught:
        import_store(tmp_path / "out", tmp_path / "t")
    assert caught.value.faults == (f"{shard.name}: {tensor}: its bytes do not fit their hash",)
    assert "3 records were" in caught.value.message
    assert content(tmp_path / "t")[0] == [*IDS[:2], IDS[4]]
    flip(shard, place.offset + place.num_bytes - 1)
    assert import_store(tmp_path / "out", tmp_path / "t").num_added == 2


def test_missing_foreign_and_renamed_shards_and_a_damaged_index_are_told(tmp_path: Path) -> None:
    export(make_store(tmp_path / "s"), tmp_path / "out", shard_bytes=2 * RECORD_BYTES)
    first = tmp_path / "out/tokens-00000-of-00003.safetensors"
    first.rename(first.with_name("z.safetensors"))
    with pytest.raises(RequestError) as caught:
        import_store(tmp_path / "out", tmp_path / "t")
    assert caught.value.faults == (
        f"{first.name}: missing, index.json lists it",
        "z.safetensors: not in index.json",
    )
    index = tmp_path / "out/index.json"
    for damaged in (
        "",
        "[" * 100_000,
        "{}",
        index.read_text().replace('"hidden": 6', '"hidden": 7'),
    ):
        index.write_text(damaged)
        with pytest.raises(RequestError, match="is damaged or no index"):
            import_store(tmp_path / "out", tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_a_damaged_record_stops_an_export_and_nothing_is_published(tmp_path: Path) -> None:
    source = make_store(tmp_path / "s")
    segment = sorted((source / "segments").iterdir())[0]
    flip(segment, 4096 + 3)
    with pytest.raises(StoreError, match="damaged"):
        export(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_a_full_disk_stops_an_export_and_nothing_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_store(tmp_path / "s")

    def full(self: ShardWriter, tokens: object, scales: object = None) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exchange_module.ShardWriter, "write", full)
    with pytest.raises(StoreError, match="No space left"):
        export(source, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_an_existing_folder_is_left_alone_unless_told(tmp_path: Path) -> None:
    source = make_store(tmp_path / "s")
    export(source, tmp_path / "out")
    (tmp_path / "out/old.txt").touch()
    with pytest.raises(EdjeError, match="left as it was"):
        export(source, tmp_path / "out")
    export(source, tmp_path / "out", overwrite=True)
    assert len(list((tmp_path / "out").iterdir())) == 2
    (tmp_path / "home").mkdir()
    (tmp_path / "home/thesis.txt").touch()
    with pytest.raises(EdjeError, match="holds other files"):
        export(source, tmp_path / "home", overwrite=True)
    assert (tmp_path / "home/thesis.txt").exists()


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """A whole shard of three records, with its header as JSON of 512 bytes at most."""
    path = tmp_path / "whole.safetensors"
    with ShardWriter(path, StoreLayout(4, 6, "float16", ENCODER, 1 << 30, ""), IDS[:3]) as writer:
        writer.write(tokens_of(3))
    return path


def rewritten(path: Path, change: Any, size: int | None = None) -> Path:
    """Write a copy of a shard with `change(header)` for its header."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    changed = change(header)
    text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
    target = path.with_name("changed.safetensors")
    target.write_bytes(
        struct.pack("<Q", len(text) if size is None else size) + text + raw[8 + length :]
    )
    return target


def test_a_whole_shard_is_read(shard: Path) -> None:
    header = read_header(rewritten(shard, lambda header: header))
    with ShardReader(header) as reader:
        assert reader.ids() == IDS[:3]
        out = np.empty((2, 4, 6), np.float16)
        reader.read(1, out)
    assert np.array_equal(out, tokens_of(3)[1:])


def entry(name: str, **values: Any) -> Any:
    return lambda header: header[name].update(values)


HOSTILE = {
    "shape larger than the file": entry("visual_tokens", shape=[3 << 40, 4, 6]),
    "shape that overflows u64": entry("visual_tokens", shape=[1 << 62, 1 << 62, 6]),
    "shape of nonsense": entry("visual_tokens", shape=[True, 4, 6]),
    "negative shape": entry("visual_tokens", shape=[-3, -4, 6]),
    "fractional shape": entry("visual_tokens", shape=[3.0, 4, 6]),
    "shape of many sizes": entry("visual_tokens", shape=[9] * 50_000),
    "shape of two sizes": entry("visual_tokens", shape=[3, 24]),
    "tokens of another dtype": entry("visual_tokens", dtype="BF16"),
    "int8 without scales": lambda header: header["visual_tokens"].update(
        dtype="I8", shape=[3, 4, 12]
    ),
    "offsets beyond the file": entry("ids", data_offsets=[168, 1 << 50]),
    "offsets in reverse": entry("visual_tokens", data_offsets=[168, 24]),
    "overlap": entry("visual_tokens", data_offsets=[20, 164]),
    "hole": entry("visual_tokens", data_offsets=[25, 169]),
    "three offsets": entry("visual_tokens", data_offsets=[24, 168, 168]),
    "no tokens": lambda header: header.pop("visual_tokens") and None,
    "a field more": entry("visual_tokens", more=1),
    "metadata of numbers": entry("__metadata__", hidden=6),
    "metadata of nonsense": lambda header: header.update(__metadata__=[]),
    "no object": lambda _: b"[]",
    "no JSON": lambda _: b'{"a":',
    "no UTF-8": lambda _: b'{"\xff": 1}',
    "deep JSON": lambda _: b"[" * 200_000,
    "names twice": lambda header: json.dumps(header).replace('"ids"', '"id_ends"').encode(),
    "ids as a matrix": entry("ids", shape=[2, 5]),
    "ends of other length": lambda header: header["id_ends"].update(dtype="U8", shape=[24]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_headers_that_lie_are_refused_without_believing_them(shard: Path, name: str) -> None:
    path = rewritten(shard, HOSTILE[name])
    tracemalloc.start()
    with pytest.raises(ShardError) as caught:
        read_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert caught.value.faults
    assert peak < 8 << 20


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_header_with_any_bytes_changed_is_refused_or_read_inside_the_file(
    shard: Path, data: st.DataObject
) -> None:
    raw = bytearray(shard.read_bytes())
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, end - 1))] = data.draw(st.integers(0, 255))
    path = shard.with_name("mutant.safetensors")
    path.write_bytes(raw)
    try:
        header = read_header(path)
        with ShardReader(header) as reader:
            out = np.empty((1, *header.record_shape), header.dtype)
            reader.read(header.num_records - 1, out)
            assert len(reader.ids()) == header.num_records
    except ShardError:
        return  # refused; anything else that is raised fails the test


@pytest.mark.parametrize("size", [0, 1, 1 << 21, 1 << 40, (1 << 64) - 1])
def test_header_lengths_that_lie_are_refused(shard: Path, size: int) -> None:
    with pytest.raises(ShardError, match="its header"):
        read_header(rewritten(shard, lambda header: header, size))


def test_a_shard_cut_anywhere_is_refused(shard: Path) -> None:
    whole = shard.read_bytes()
    for length in range(len(whole)):
        shard.write_bytes(whole[:length])
        with pytest.raises(ShardError):
            read_header(shard)
    shard.write_bytes(whole + b"\0")
    with pytest.raises(ShardError, match="its tensors end"):
        read_header(shard)


def test_a_shard_that_shrinks_after_its_header_was_read_is_an_error(shard: Path) -> None:
    header = read_header(shard)
    with shard.open("r+b") as file:
        file.truncate(header.tensors["visual_tokens"].offset + 60)
    with ShardReader(header) as reader:
        with pytest.raises(ShardError, match=r"ends \d+ bytes early"):
            reader.read(0, np.empty((3, 4, 6), np.float16))
        with pytest.raises(ShardError, match=r"ends \d+ bytes early"):
            reader.ids()


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([1, 9, 10], "UTF-8"),
        ([1, 8, 9], "do not divide"),
        ([8, 1, 10], "do not divide"),
        ([-1, 8, 10], "do not divide"),
        ([0, 8, 10], "1 are empty"),
        ([1, 1 << 62, 10], "do not divide"),
    ],
)
def test_ids_that_do_not_fit_are_refused(shard: Path, ends: list[int], message: str) -> None:
    header = read_header(shard)
    with shard.open("r+b") as file:
        file.seek(header.tensors["id_ends"].offset)
        file.write(np.array(ends, "<i8").tobytes())
    with ShardReader(header) as reader, pytest.raises(ShardError, match=message):
        reader.ids()


def test_ids_that_come_twice_in_a_shard_are_refused(tmp_path: Path) -> None:
    tensors = {"visual_tokens": tokens_of(2), "ids": foreign_ids(["a", "a"])}
    save_file(tensors, tmp_path / "a.safetensors")
    header = read_header(tmp_path / "a.safetensors")
    with ShardReader(header) as reader, pytest.raises(ShardError, match="more than once"):
        reader.ids()
