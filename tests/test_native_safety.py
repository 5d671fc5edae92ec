"""The native engine lives on whatever it is asked: impossible arguments are refused, forks and threads do no harm."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hanmo.errors import HanmoError, ModelError, ResourceError
from hanmo.inference.native import library
from hanmo.inference.native.decoder import CACHES, LoadedParts, NativeDecoder, PagedCache, Weights, prepare
from hanmo.inference.native.folder import WEIGHTS, save_quantized
from hanmo.inference.native.pages import PagedText, Pages
from hanmo.models.kernels import native as kernels
from hanmo.text.training import train_bpe

from .native_cases import LAYOUTS, decoder

pytestmark = pytest.mark.skipif(library.load()[0] is None, reason=f"no native engine: {library.load()[1]}")

WHOLE = st.integers(-3, 130) | st.integers(-(2**31), 2**31 - 1) | st.integers(-(2**70), 2**70)
HERE = Path(library.__file__).parent
WHOLE64 = st.integers(-2, 6) | st.integers(-(2**63), 2**63 - 1)


def native(
    layout: str, precision: str = "fp32", cache: str = "fp16", threads: int = 2, rows: int = 64, **changes: Any
) -> NativeDecoder:
    """A small decoder in the native engine."""
    model = decoder(layout, **changes)
    parts = prepare(model.config, Weights.of_state(model.state_dict()), precision)
    return NativeDecoder(model.config, parts, threads=threads, rows=rows, cache=cache)


@pytest.fixture(scope="module")
def cache() -> PagedCache:
    return PagedCache(native("llama", threads=1), 4)


def expected_of(cache: PagedCache) -> torch.Tensor:
    """The logits of a short text in the last page."""
    return cache.forward([1, 2, 3], [0] * 3, range(3), [[3]], range(3))


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(WHOLE, WHOLE, WHOLE), max_size=6),
    tables=st.lists(st.lists(WHOLE, max_size=3), max_size=3),
    wanted=st.lists(WHOLE, max_size=3),
    adapters=st.none() | st.lists(WHOLE, max_size=6),
)
def test_any_request_is_computed_or_refused(
    cache: PagedCache,
    rows: list[tuple[int, int, int]],
    tables: list[list[int]],
    wanted: list[int],
    adapters: list[int] | None,
) -> None:
    expected = expected_of(cache)
    ids, texts, positions = ([row[part] for row in rows] for part in range(3))
    try:
        logits = cache.forward(ids, texts, positions, tables, wanted, adapters)
    except ModelError:
        assert torch.equal(expected_of(cache), expected)
    else:
        assert logits.shape == (len(wanted), 101)
        assert all(0 <= token < 101 for token in ids)
        assert all(0 <= position < 128 for position in positions)
        assert set(adapters or ()) <= {-1}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_network_is_made_or_refused(data: st.DataObject) -> None:
    """Sizes at the ends of their ranges, whose products have more than 64 bits, and numbers that are none."""
    extreme = st.sampled_from([2**63 - 1, -(2**63), 2**62, 2**46, 2**32, 2**31, 2**31 - 1, 2**22, 2**20, 4096, 0, -1])
    numbers = st.floats(width=32)
    sizes = [3, 48, 6, 2, 8, 84, 101, 128, 8, 0, 1, 0, 0, 16]
    floats = [1e-5, 1.0, 0.35, 0.0, 0.0]
    for place in data.draw(st.lists(st.integers(0, len(sizes) - 1), max_size=4)):
        sizes[place] = data.draw(extreme)
    if data.draw(st.booleans()):
        floats[data.draw(st.integers(0, 4))] = data.draw(numbers)
    handle, cache = ctypes.c_void_p(), ctypes.c_void_p()
    threads = data.draw(st.sampled_from([1, 2, 1024, 0, -1, 2**62]))
    try:
        library.call("model_new", np.array(sizes), np.array(floats, np.float32), threads, ctypes.byref(handle))
    except (ModelError, ResourceError):
        assert not handle
        return
    assert np.isfinite(floats).all()
    try:
        with pytest.raises((ModelError, ResourceError)):
            pages = data.draw(st.sampled_from([2**62, 2**31 + 1, 0, -1]))
            library.call("cache_new", handle, pages, 2, ctypes.byref(cache))
        with pytest.raises((ModelError, ResourceError)):
            library.call("cache_new", handle, 1, data.draw(st.sampled_from([0, 3, 8, -1])), ctypes.byref(cache))
        one = torch.ones(1)
        for _ in range(5):
            with pytest.raises(ModelError):
                library.call("model_matrix", handle, *(data.draw(WHOLE64) for _ in range(5)), one, 4, None, 0)
            with pytest.raises(ModelError):
                library.call("model_adapter", handle, *(data.draw(WHOLE64) for _ in range(4)), one, 4, one, 4)
    finally:
        library.call("model_free", handle)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    model = decoder("llama")
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"):
        for precision in ("fp32", "fp16"):
            state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            state[name].flatten()[-1] = value
            with pytest.raises(ModelError, match="infinite"):
                NativeDecoder(model.config, prepare(model.config, Weights.of_state(state), precision))
    for precision in ("int8", "int4"):
        parts = prepare(model.config, Weights.of_state(model.state_dict()), precision)
        part = parts["layers.0.qkv"]
        assert not isinstance(part, torch.Tensor)
        part.scales.flatten()[5] = value
        with pytest.raises(ModelError, match="infinite"):
            NativeDecoder(model.config, parts)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_sums_that_overflow_spoil_only_their_own_text(precision: str, cache: str) -> None:
    """One token has an embedding so large that its keys and values are infinite or no numbers; pages that it filled are
    read by others later."""
    model = decoder("llama")
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for name in state:
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = state[name] * 50
        elif name.endswith("down_proj.weight"):
            state[name] = state[name] * 60000
    state["model.layers.0.input_layernorm.weight"] *= 1e36  # NaN or infinite from the first layer on
    parts = prepare(model.config, Weights.of_state(state), precision)
    wild = NativeDecoder(model.config, parts, threads=2, rows=64, cache=cache)
    tame = native("llama", precision, cache)
    fresh, shared = PagedCache(tame, 2), PagedCache(tame, 2)
    library.call("forward", *raw(wild, shared, 64))
    ids = list(range(1, 41))
    expected = fresh.forward(ids, [0] * 40, range(40), [[0, 1]], range(40))
    assert expected.isfinite().all()
    assert torch.equal(shared.forward(ids, [0] * 40, range(40), [[0, 1]], range(40)), expected)


def raw(decoder: NativeDecoder, cache: PagedCache, count: int) -> tuple[object, ...]:
    """The arguments of a call that fills two pages of a cache of another decoder of the same shape."""
    ids, zeros = torch.full((count,), 7, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    positions, tables = torch.arange(count, dtype=torch.int32), torch.arange(2, dtype=torch.int32)
    return decoder.handle, cache.handle, count, ids, zeros, positions, None, 1, 2, tables, 0, None, None


def test_a_page_that_is_written_belongs_to_one_text(cache: PagedCache) -> None:
    cache.forward([1] * 32, [0] * 32, range(32), [[0]], [])
    cache.forward([1, 1], [0, 1], [32, 32], [[0, 1], [0, 2]], [])  # what is full may be shared
    for texts, positions, tables in (
        ([0, 1], [32, 32], [[0, 1], [0, 1]]),
        ([0, 1], [0, 32], [[0], [0, 1]]),
        ([0], [32], [[1, 1]]),
    ):
        with pytest.raises(ModelError, match="two places"):
            cache.forward([1] * len(texts), texts, positions, tables, [])


def test_a_table_that_is_too_short_is_refused(cache: PagedCache) -> None:
    with pytest.raises(ModelError, match="page"):
        cache.forward([1, 1], [0, 1], [0, 40], [[0, 1], [2]], [])


@pytest.mark.parametrize("form", CACHES)
def test_walks_of_forks_and_trims_keep_every_bit(form: str) -> None:
    chance = random.Random(form)
    for layout in chance.sample(sorted(LAYOUTS), 3):
        engine = native(layout, chance.choice(["fp32", "int8", "int4"]), form)
        cache = PagedCache(engine, 24)
        pages = Pages(24, cache.copy)
        alone = PagedCache(engine, 4)
        texts: list[tuple[PagedText, list[int]]] = []
        for _ in range(25):
            if len(texts) < 4:
                texts.append((PagedText(pages), []))
            if chance.random() < 0.3 and len(texts) < 6:
                sequence, ids = chance.choice(texts)
                texts.append((sequence.fork(), list(ids)))
            if chance.random() < 0.2:
                sequence, ids = chance.choice(texts)
                length = chance.randint(0, len(ids))
                sequence.trim(length)
                del ids[length:]
            if chance.random() < 0.2:
                texts.pop(chance.randrange(len(texts)))[0].release()
            chosen = [text for text in texts if len(text[1]) < 80 and chance.random() < 0.7]
            rows: list[tuple[int, int, int]] = []
            for number, (sequence, ids) in enumerate(chosen):
                count = chance.choice([1, 1, 2, 9])
                sequence.reserve(count)
                new = [chance.randrange(101) for _ in range(count)]
                rows += [(token, number, len(ids) + place) for place, token in enumerate(new)]
                ids += new
                sequence.length = len(ids)
            if not rows:
                continue
            columns = [list(column) for column in zip(*rows, strict=True)]
            got = cache.forward(*columns, [sequence.table for sequence, _ in chosen], range(len(rows)))
            place = chance.randrange(len(rows))
            _, number, position = rows[place]
            ids = chosen[number][1][: position + 1]
            for start in range(0, len(ids), 50):
                piece = ids[start : start + 50]
                last = alone.forward(
                    piece, [0] * len(piece), range(start, start + len(piece)), [range(4)], [len(piece) - 1]
                )
            assert torch.equal(got[place], last[0])
        for sequence, _ in texts:
            sequence.release()
        assert sorted(pages.free) == list(range(24))


def together(count: int, work: Callable[[int], None]) -> None:
    """Call work(number) on several threads at the same time; its first error is raised here."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("decoders", [1, 3])
def test_threads_may_call_at_the_same_time(decoders: int) -> None:
    caches = [PagedCache(native("llama"), 4) for _ in range(decoders)]
    expected = expected_of(caches[0])

    def work(number: int) -> None:
        cache, page = caches[number % decoders], number // decoders
        for _ in range(100):
            assert torch.equal(cache.forward([1, 2, 3], [0] * 3, range(3), [[page]], range(3)), expected)

    together(4 if decoders == 1 else 3, work)


def in_a_process(program: str) -> str:
    """What a program prints in a process of its own; it must end by itself."""
    start = "import os, signal, sys, threading, time, torch\nfrom tests.native_cases import decoder\n"
    start += "from tests.test_native_safety import expected_of, native\n"
    start += "from hanmo.inference.native.decoder import PagedCache\ncache = PagedCache(native('llama'), 4)\n"
    done = subprocess.run(
        [sys.executable, "-c", start + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path]), "OMP_NUM_THREADS": "2"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("level", library.LEVELS)
def test_a_long_text_has_the_same_bits_at_once_and_in_pieces(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form of the library that this machine runs. At once, each of two threads has some 200 rows: for so many,
    weights of 8 bits are expanded first."""
    if not library.LEVELS[level] <= kernels.processor_flags() or not any(HERE.glob(f"_{level}.*")):
        pytest.skip(f"this machine does not run {level}")
    monkeypatch.setenv("HANMO_NATIVE", level)
    out = in_a_process("""
        from hanmo.inference.native import library
        ids = torch.randint(0, 101, (401,), generator=torch.Generator().manual_seed(0)).tolist()
        def read(layout, precision, piece, threads):
            sizes = {'max_position_embeddings': 640}
            cache = PagedCache(native(layout, precision, threads=threads, rows=512, **sizes), 13)
            parts = []
            for start in range(0, len(ids), piece):
                part = ids[start : start + piece]
                places = range(start, start + len(part))
                parts.append(cache.forward(part, [0] * len(part), places, [range(13)], range(len(part))))
            return torch.cat(parts)
        for layout in ('llama', 'odd sizes', 'gpt2'):
            for precision in ('int8', 'int4', 'fp16'):
                whole = read(layout, precision, 512, 2)
                same = [torch.equal(read(layout, precision, *rest), whole) for rest in ((32, 2), (130, 1), (7, 1))]
                print(library.load()[1], layout, precision, all(same) and bool(whole.isfinite().all()))
    """)
    lines = out.splitlines()
    assert len(lines) == 9 and all(line.startswith(level) and line.endswith("True") for line in lines), out


@pytest.mark.skipif(sys.platform != "linux", reason="memory of files elsewhere has other rules")
@pytest.mark.parametrize("precision", ["int8", "int4", "fp32"])
def test_a_mapped_file_that_is_cut_off_is_refused_and_all_else_goes_on(precision: str, tmp_path: Path) -> None:
    model = decoder("llama")
    parts = prepare(model.config, Weights.of_state(model.state_dict()), precision)
    save_quantized(tmp_path / "m", LoadedParts(model.config, parts, train_bpe(["a b"] * 3, 262), {}, ""), provenance={})
    path = tmp_path / "m" / WEIGHTS
    out = in_a_process(f"""
        from pathlib import Path
        from hanmo.errors import ModelError
        from hanmo.inference.native.folder import map_file, parts_of_file, read_matrices, read_whole_header
        from hanmo.inference.native.decoder import NativeDecoder
        path = Path({str(path)!r})
        header, metadata, start = read_whole_header(path)
        parts = parts_of_file(path, header, start, read_matrices(path, metadata), map_file(path))
        mapped = PagedCache(NativeDecoder(cache.decoder.config, parts, threads=2, rows=64), 4)
        expected = expected_of(cache)
        expected_of(mapped)
        threading.Timer(0.05, os.truncate, (path, start + 100)).start()  # while it computes
        said, ends = set(), time.monotonic() + 20
        while len(said) < 1 and time.monotonic() < ends:
            try:
                expected_of(mapped)
            except ModelError as error:
                said.add(error.what)
        try:
            expected_of(mapped)
        except ModelError as error:
            said.add(error.what)
        print(said, torch.equal(expected_of(cache), expected))
    """)
    assert out.strip() == "{'the file of the weights was cut off while it was in use'} True"


@pytest.mark.skipif(sys.platform != "linux", reason="signals of files are Linux's")
def test_signals_that_are_not_ours_do_what_they_did() -> None:
    out = in_a_process("""
        child = os.fork()
        if not child:
            os.kill(os.getpid(), signal.SIGBUS)
            time.sleep(20)
            os._exit(0)
        print(os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGBUS)
        signal.signal(signal.SIGBUS, lambda *_: print('told', flush=True))
        native('llama')
        os.kill(os.getpid(), signal.SIGBUS)
        time.sleep(0.01)
    """)
    assert out.split() == ["True", "told"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_process_computes_with_what_its_parent_made() -> None:
    """Both with a decoder of the parent's and with one of its own, while another thread of the parent computes."""
    out = in_a_process("""
        expected = expected_of(cache)
        done = threading.Event()
        busy = threading.Thread(target=lambda: [expected_of(cache) for _ in iter(done.is_set, True)])
        busy.start()
        for _ in range(5):
            child = os.fork()
            if not child:
                signal.alarm(30)
                own = PagedCache(native('llama'), 4)
                same = [torch.equal(expected_of(one), expected) for one in (cache, own)]
                os._exit(0 if all(same) else 1)
            assert os.waitpid(child, 0)[1] == 0
        done.set()
        busy.join()
        print('alive', torch.equal(expected_of(cache), expected))
    """)
    assert out.strip() == "alive True"


def test_control_c_ends_a_long_run_and_leaves_the_decoder_usable() -> None:
    out = in_a_process("""
        expected = expected_of(cache)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stopped = 0
        for _ in range(5):
            try:
                threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT)).start()
                for _ in range(10**6):
                    expected_of(cache)
            except KeyboardInterrupt:
                stopped += 1
        print(stopped, torch.equal(expected_of(cache), expected))
    """)
    assert out.strip() == "5 True"


def test_closed_decoders_refuse() -> None:
    cache = PagedCache(native("llama"), 1)
    cache.decoder.close()
    with pytest.raises(HanmoError):
        expected_of(cache)
    cache.decoder.close()
