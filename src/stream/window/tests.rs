//! Tests of the window against a byte array, and against an oracle that tries every policy.

use proptest::prelude::*;

use super::*;

const SIZE: usize = 48;

/// A write of `len` bytes of one value; 0 writes zeros.
#[derive(Clone, Debug)]
struct Op {
    at: usize,
    value: u8,
    len: usize,
    punch: bool,
}

fn op() -> impl Strategy<Value = Op> {
    let value = prop_oneof![1 => Just(0u8), 4 => 1..4u8];
    (0..SIZE, 1..16usize, value, prop::bool::weighted(0.1)).prop_map(|(at, len, value, punch)| Op {
        at,
        value,
        len: len.min(SIZE - at),
        punch,
    })
}

/// A stream whose data is in an array and whose sink is a `Vec`.
struct SimulatedStream {
    window: Window,
    held: Vec<u8>,
    out: Vec<u8>,
}

impl SimulatedStream {
    fn new(window: u64, spill: u64) -> Self {
        let window = Window::new(SIZE as u64, window, spill);
        Self { window, held: vec![0; SIZE], out: Vec::new() }
    }

    /// Applies `op`; returns whether it was accepted.
    fn run(&mut self, op: &Op) -> bool {
        let value = if op.punch { 0 } else { op.value };
        let bytes = vec![value; op.len];
        let offset = op.at as u64;
        let range = offset..offset + op.len as u64;
        if let Some(at) = self.window.first_change(offset, &bytes) {
            self.window.note_change(at);
            if at < self.window.frontier() {
                return false;
            }
        }
        let written = match (op.punch, value) {
            (true, _) => None,
            (_, 0) => Some(Written::Zeros),
            _ => Some(Written::Data),
        };
        let range = range.start.max(self.window.frontier())..range.end;
        if !range.is_empty() {
            self.window.set(range, written);
            self.held[op.at..op.at + op.len].fill(value);
        }
        self.window.advance();
        self.drain();
        self.check();
        true
    }

    fn drain(&mut self) {
        while let Some(run) = self.window.take_next(5) {
            assert_eq!(run.range.start, self.out.len() as u64);
            let range = run.range.start as usize..run.range.end as usize;
            match run.written {
                Some(Written::Data) => self.out.extend(&self.held[range]),
                _ => self.out.resize(range.end, 0),
            }
            self.window.mark_accepted(run.range.end);
        }
    }

    fn check(&self) {
        let window = &self.window;
        window.runs.check();
        assert!(window.accepted <= window.taken && window.taken <= window.frontier);
        assert!(window.beyond <= window.spill);
        assert_eq!(window.beyond, window.runs.data_bytes(window.edge()..u64::MAX));
        assert_eq!(window.unaccepted, window.runs.data_bytes(window.accepted..u64::MAX));
        let written: u64 = window.runs.within(0..window.size).map(|(part, _)| len(&part)).sum();
        assert_eq!(window.written().load(Ordering::Relaxed), written);
    }

    fn finish(mut self) -> Vec<u8> {
        self.window.finish(SIZE as u64);
        self.drain();
        assert_eq!(self.window.unaccepted(), 0);
        self.out
    }
}

/// Returns whether any in-order policy within the budget succeeds, even one that knows the future:
/// every frontier that a policy could have is followed, step by step.
fn oracle(ops: &[Op], window: usize, spill: usize) -> bool {
    let mut image = [0u8; SIZE];
    let mut frontiers = [false; SIZE + 1];
    frontiers[0] = true;
    for op in ops {
        let value = if op.punch { 0 } else { op.value };
        let range = op.at..op.at + op.len;
        let changes = |at: &usize| image[*at] != 0 || value != 0;
        if let Some(first) = range.clone().find(changes) {
            frontiers[first + 1..].fill(false);
        }
        image[range].fill(value);
        let beyond = |frontier: usize| {
            image.iter().skip(frontier + window).filter(|byte| **byte != 0).count()
        };
        let mut reachable = false;
        for (frontier, may_be_at) in frontiers.iter_mut().enumerate() {
            reachable |= *may_be_at;
            *may_be_at = reachable && beyond(frontier) <= spill;
        }
    }
    frontiers.contains(&true)
}

fn succeeds(ops: &[Op], window: u64, spill: u64) -> bool {
    let mut sim = SimulatedStream::new(window, spill);
    ops.iter().all(|op| sim.run(op))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(10_000))]

    #[test]
    fn the_output_is_the_final_image_or_the_stream_fails(
        ops in prop::collection::vec(op(), 1..40),
        window in 0..=SIZE as u64,
        spill in 0..=SIZE as u64,
    ) {
        let mut sim = SimulatedStream::new(window, spill);
        let mut image = vec![0; SIZE];
        for op in &ops {
            if !sim.run(op) {
                return Ok(());
            }
            image[op.at..op.at + op.len].fill(if op.punch { 0 } else { op.value });
        }
        prop_assert_eq!(sim.finish(), image);
    }

    #[test]
    fn the_window_fails_only_where_a_policy_that_knows_the_future_fails(
        ops in prop::collection::vec(op(), 1..25),
        window in 0..=SIZE,
        spill in 0..=SIZE,
    ) {
        let lazy = succeeds(&ops, window as u64, spill as u64);
        prop_assert_eq!(lazy, oracle(&ops, window, spill));
    }

    #[test]
    fn the_needed_window_and_spill_are_the_smallest_that_suffice(
        ops in prop::collection::vec(op(), 1..25),
        window in 0..=SIZE as u64,
    ) {
        let mut sim = SimulatedStream::new(window, u64::MAX);
        prop_assert!(ops.iter().all(|op| sim.run(op)), "without a limit nothing fails");
        let NeededSizes { window: needed, spill } = sim.window.needed();
        prop_assert!(succeeds(&ops, needed, 0));
        prop_assert!(needed == 0 || !succeeds(&ops, needed - 1, 0));
        prop_assert!(succeeds(&ops, window, spill));
        prop_assert!(spill == 0 || !succeeds(&ops, window, spill - 1));
    }

    #[test]
    fn truncation_drops_the_held_data_and_nothing_else(
        ops in prop::collection::vec(op(), 1..20),
        window in 0..=SIZE as u64,
        at in 0..=SIZE,
    ) {
        let mut sim = SimulatedStream::new(window, 0);
        let mut image = vec![0; SIZE];
        for op in &ops {
            if !sim.run(op) {
                return Ok(());
            }
            image[op.at..op.at + op.len].fill(if op.punch { 0 } else { op.value });
        }
        let sent_data = sim.out[at.min(sim.out.len())..].iter().any(|byte| *byte != 0);
        let highest = sim.window.highest();
        prop_assert_eq!(sim.window.truncate(at as u64), !sent_data);
        sim.check();
        if !sent_data {
            image[at..].fill(0);
            prop_assert!(sim.window.highest() <= highest.min((at as u64).max(sim.window.frontier())));
        }
        prop_assert_eq!(sim.finish(), image);
    }
}

#[test]
fn a_write_beyond_the_edge_advances_the_frontier_just_far_enough() {
    let mut window = Window::new(100, 10, 0);
    window.set(0..4, Some(Written::Data));
    assert!(!window.advance());
    window.set(20..25, Some(Written::Data));
    assert!(window.advance());
    assert_eq!(window.frontier(), 15);
    assert_eq!(
        window.take_next(3),
        Some(OutgoingRun { range: 0..3, written: Some(Written::Data) })
    );
    assert_eq!(
        window.take_next(3),
        Some(OutgoingRun { range: 3..4, written: Some(Written::Data) })
    );
    assert_eq!(window.take_next(3), Some(OutgoingRun { range: 4..15, written: None }));
    assert_eq!(window.take_next(3), None);
    assert_eq!(window.unaccepted(), 9);
    window.mark_accepted(4);
    assert_eq!(window.unaccepted(), 5);
}

#[test]
fn the_lowest_data_leaves_first_and_no_more_than_necessary() {
    let mut window = Window::new(1000, 0, 10);
    window.set(900..908, Some(Written::Data));
    assert!(!window.advance());
    window.set(100..105, Some(Written::Data));
    assert!(window.advance());
    assert_eq!(window.frontier(), 103);
    assert_eq!(window.beyond(), 10);
}

#[test]
fn too_many_sent_runs_are_joined() {
    let size = 1 << 40;
    let mut window = Window::new(size, 0, 0);
    let count = 3 * MAX_RUNS as u64;
    for at in (0..count).map(|number| number * 8192) {
        window.set(at..at + 512, Some(Written::Data));
        window.advance();
        while let Some(run) = window.take_next(1 << 20) {
            window.mark_accepted(run.range.end);
        }
        assert!(window.runs.len() <= MAX_RUNS + 1);
    }
    assert!(!window.is_exact());
    assert_eq!(window.extent_at(0..size).kind, ExtentKind::Data);
    assert_eq!(window.unaccepted(), 0);
}

#[test]
fn joining_runs_does_not_change_unaccepted_runs() {
    let mut window = Window::new(1 << 30, 0, 0);
    window.max_runs = 4;
    for at in 0..8u64 {
        window.set(at * 8192..at * 8192 + 4096, Some(Written::Data));
    }
    // A run of zeros that the next frontier cuts in two.
    window.set(65536..1 << 20, Some(Written::Zeros));
    window.frontier = 80_000;
    while let Some(run) = window.take_next(1 << 20) {
        window.mark_accepted(run.range.end);
    }
    window.beyond = window.runs.data_bytes(window.edge()..window.size);
    window.set(2 << 20..(2 << 20) + 4096, Some(Written::Data));
    window.advance();
    assert!(!window.is_exact());
    assert_eq!(window.runs().data_bytes(80_000..1 << 20), 0, "zeros have become data");
    while let Some(run) = window.take_next(1 << 20) {
        window.mark_accepted(run.range.end);
    }
    assert_eq!(window.unaccepted(), 0);
}

#[test]
fn holes_in_joined_runs_do_not_make_the_written_count_negative() {
    let mut window = Window::new(1 << 30, 0, 0);
    window.max_runs = 4;
    for at in 0..16u64 {
        window.set(at * 65536..at * 65536 + 512, Some(Written::Data));
        window.advance();
        while let Some(run) = window.take_next(1 << 20) {
            window.mark_accepted(run.range.end);
        }
    }
    assert!(!window.is_exact());
    window.set(0..16 * 65536, None);
    assert_eq!(window.written().load(Ordering::Relaxed), 0);
}
