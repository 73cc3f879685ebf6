"""Which layer serves whom, against the definitions written down naively."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from snapfs.engine.bitmap import Bitmap
from snapfs.engine.geometry import Geometry
from snapfs.engine.layer import LOSSES_BYTES, Layer
from snapfs.engine.layers import LayerStack
from tests.support.images import CLUSTER, MemoryImage
from tests.support.naive import naive_pending, naive_source, naive_wanted

MOST = 9
bits = st.lists(st.booleans(), min_size=MOST, max_size=MOST)
described = st.lists(st.tuples(st.integers(0, MOST), bits, bits, st.booleans()), max_size=4)
ranges = st.tuples(st.integers(0, MOST), st.integers(0, MOST)).map(sorted)


def bitmap_of(values: list[bool]) -> Bitmap:
    bitmap = Bitmap(len(values))
    for index, value in enumerate(values):
        if value:
            bitmap.set(index, index + 1)
    return bitmap


def stack_of(layers: list[tuple[int, list[bool], list[bool], bool]]) -> LayerStack:
    made = []
    for number, (clusters, access, done, live) in enumerate(layers):
        layer = Layer(
            number + 1,
            Geometry(clusters * CLUSTER, CLUSTER),
            bitmap_of([bit and live for bit in access[:clusters]]),
            bitmap_of(done[:clusters]),
            MemoryImage(),
            bytearray(LOSSES_BYTES),
        )
        layer.live = live
        made.append(layer)
    return LayerStack(made, MOST)


@given(described)
def test_settling_everything_gives_the_definitions(layers):
    stack = stack_of(layers)
    all_layers = list(stack)
    before = [[layer.done.get(index) for index in range(len(layer.done))] for layer in all_layers]
    wanted = [
        [naive_wanted(all_layers, number, index) for index in range(len(layer.done))]
        for number, layer in enumerate(all_layers)
    ]
    dropped = [(layer, list(runs)) for layer, runs in stack.settle(0, MOST)]
    for number, layer in enumerate(all_layers):
        expected = [a and b for a, b in zip(before[number], wanted[number], strict=True)]
        assert expected == [layer.done.get(index) for index in range(len(layer.done))]
        gone = {index for index, bit in enumerate(before[number]) if bit and not expected[index]}
        said = {
            index
            for each, runs in dropped
            if each is layer
            for first, stop in runs
            for index in range(first, stop)
        }
        assert gone == said
    assert [naive_pending(all_layers, index) for index in range(MOST)] == [
        stack.pending.get(index) for index in range(MOST)
    ]


@given(described, ranges)
def test_settling_a_range_touches_nothing_else(layers, within):
    first, stop = within
    whole, partly = stack_of(layers), stack_of(layers)
    whole.settle(0, MOST)
    untouched = [layer.done.slice(0, len(layer.done)) for layer in partly]
    partly.settle(first, stop)
    for settled, layer, old in zip(whole, partly, untouched, strict=True):
        for index in range(len(layer.done)):
            expected = settled.done.get(index) if first <= index < stop else bool(old[index])
            assert expected == layer.done.get(index)
    for index in range(first, stop):
        assert whole.pending.get(index) == partly.pending.get(index)


@given(described, ranges)
def test_sources_and_who_needs_the_image(layers, within):
    first, stop = within
    stack = stack_of(layers)
    stack.settle(0, MOST)
    all_layers = list(stack)
    for number, layer in enumerate(all_layers):
        end = min(stop, len(layer.done))
        found = list(stack.sources(layer, min(first, end), end)) if first < end else []
        clusters = {index: source for a, b, source in found for index in range(a, b)}
        assert {
            index: naive_source(all_layers, number, index)
            for index in range(first, max(first, end))
        } == clusters
    needing = {
        (layer, first + index)
        for layer, found_bits in stack.needing(first, stop)
        for index, bit in enumerate(found_bits)
        if bit
    }
    assert {
        (layer, index)
        for number, layer in enumerate(all_layers)
        for index in range(first, min(stop, len(layer.access)))
        if layer.access.get(index) and naive_source(all_layers, number, index) is None
    } == needing


def test_copies_go_to_the_newest_live_layer():
    clear = [False] * MOST
    stack = stack_of([(3, clear, clear, True), (3, clear, clear, True), (3, clear, clear, False)])
    assert stack.receiver is list(stack)[1]
    assert stack_of([(3, clear, clear, False)]).receiver is None


def test_done_bits_are_cleared_where_they_are_and_nowhere_set():
    """The kernel may write a mapped page back at any moment: no bit may be set for a while."""

    class Mapped(Bitmap):
        def assign(self, first, bits):
            raise AssertionError("bits that were clear are written")

    done = Mapped(MOST)
    for first, stop in ((0, 2), (3, 4), (6, 9)):
        done.set(first, stop)
    access = bitmap_of([index in (1, 7) for index in range(MOST)])
    geometry = Geometry(MOST * CLUSTER, CLUSTER)
    layer = Layer(1, geometry, access, done, MemoryImage(), bytearray(LOSSES_BYTES))
    ((dropped, runs),) = LayerStack([layer], MOST).settle(0, MOST)
    assert (layer, [(0, 1), (3, 4), (6, 7), (8, 9)]) == (dropped, list(runs))
    assert [(1, 2), (7, 8)] == list(done.runs(0, MOST))


def settled(layers) -> LayerStack:
    stack = stack_of(layers)
    stack.settle(0, MOST)
    return stack


def told(stack: LayerStack, dropped) -> tuple:
    """All that settling changes, and what it says."""
    return (
        [layer.done.slice(0, len(layer.done)) for layer in stack],
        stack.pending.slice(0, MOST),
        {layer.id: list(runs) for layer, runs in dropped},
    )


@given(described, st.integers(0, 3), bits, ranges)
def test_access_of_one_layer_goes_as_if_all_were_settled(layers, which, cleared, within):
    one, other = settled(layers), settled(layers)
    if which >= len(one):
        return
    results = []
    for stack in (one, other):
        layer = list(stack)[which]
        stop = min(within[1], len(layer.access))
        first = min(within[0], stop)
        before = layer.access.slice(first, stop)
        for index in range(first, stop):
            if cleared[index]:
                layer.access.clear(index, index + 1)
        gone = before & ~layer.access.slice(first, stop)
        if stack is one:
            results.append(told(stack, stack.withdrawn(layer, first, gone)))
        else:
            results.append(told(stack, stack.settle(0, MOST)))
    assert results[1] == results[0]


@given(described, ranges)
def test_a_copy_lands_as_if_all_were_settled(layers, within):
    one, other = settled(layers), settled(layers)
    results = []
    for stack in (one, other):
        layer = stack.receiver
        if layer is None:
            return
        first, stop = (min(end, len(layer.done)) for end in within)
        for start, end in list(stack.pending.runs(first, min(stop, len(stack.pending)))):
            layer.done.set(start, end)
            if stack is one:
                results.append(told(stack, stack.landed(layer, start, end)))
            else:
                results.append(told(stack, stack.settle(start, end)))
    count = len(results) // 2
    assert results[count:] == results[:count]


def test_a_copy_that_nobody_wants_any_more_is_dropped():
    stack = settled([(MOST, [True] * MOST, [False] * MOST, True)])
    layer = stack.receiver
    assert layer is not None
    stack.withdrawn(layer, 2, layer.withdraw(2, 4))
    layer.done.set(1, 5)
    assert [(layer, [(2, 4)])] == [(each, list(runs)) for each, runs in stack.landed(layer, 1, 5)]


def test_a_search_goes_through_any_number_of_layers():
    clusters = 3000
    layers = []
    for number in range(clusters):  # each has one cluster: the search splits at every layer
        done = Bitmap(clusters)
        done.set(number, number + 1)
        layers.append(
            Layer(
                number + 1,
                Geometry(clusters * CLUSTER, CLUSTER),
                Bitmap(clusters),
                done,
                MemoryImage(),
                bytearray(LOSSES_BYTES),
            )
        )
    stack = LayerStack(layers, clusters)
    found = list(stack.sources(layers[0], 0, clusters))
    assert [(number, number + 1, layer) for number, layer in enumerate(layers)] == found


def test_names_and_numbers_are_found_at_once():
    layer_of = (MOST, [True] * MOST, [False] * MOST, True)
    stack = stack_of([layer_of] * 2)
    one, two = stack
    stack.rename(one, "one")
    assert (one, None) == (stack.find("one"), stack.find("two"))
    stack.rename(one, "two")
    assert (None, one) == (stack.find("one"), stack.find("two"))
    assert (two, None) == (stack.find_id(2), stack.find_id(3))
    one.live = False
    stack.withdrawn(one, 0, one.withdraw(0, MOST))
    stack.rename(one, None)
    stack.remove(one)
    assert (None, None, [two]) == (stack.find("two"), stack.find_id(1), list(stack))
    assert (False, True) == (one in stack, two in stack)


def test_how_much_was_copied_is_counted_when_it_may_have_changed(monkeypatch):
    """Native code sets bits of the layer that receives, behind the back of its bitmap."""
    wanted, nothing = [True] * 8, [False] * 8
    stack = stack_of([(8, wanted, nothing, True)])
    (old,) = stack
    old.done.set(0, 2)
    assert (2, 2) == (old.copied(True), old.copied(False))
    old.done.bits[2] = 1
    assert (3, 2) == (old.copied(True), old.copied(False))
    (new,) = stack_of([(8, wanted, nothing, True)])
    new.id = 2
    stack.append(new)
    counted = []
    real = Bitmap.count
    monkeypatch.setattr(Bitmap, "count", lambda *a: counted.append(1) or real(*a))
    assert [3] * 3 == [old.copied(False) for _ in range(3)]
    assert 1 == len(counted)
    old.done.clear(0, 1)
    assert 2 == old.copied(False)
    old.done.assign(0, old.done.slice(0, 8) | ~old.done.slice(0, 8))
    assert 8 == old.copied(False)
    assert 3 == len(counted)
