//! The state of an overlay after the daemon is killed, the power fails or the host returns an
//! error, at every storage operation: everything promised is there, and nothing that was never
//! written.

use std::io::IoSlice;
use std::sync::Arc;
use std::thread;

use crate::common::library::{SimDisk, SimDisks, TestBase};
use crate::common::model::{End, Menu, Model, Op, apply, op, perform};
use crate::common::sim::{Chance, Deed, Role, SECTOR, SimLayer};
use crate::common::written;
use cowslip::layer::{Wait, WritableLayer};
use cowslip::overlay::error::LogError;
use cowslip::overlay::host_file::{HostFile, SEGMENT_LEN};
use cowslip::overlay::record::{BootTag, LayerMap, LogRecord, MtimeOrigin, RECORD_LEN};
use cowslip::overlay::record_log::{self, Log, LogDir};
use cowslip::overlay::recover::Recovered;
use cowslip::overlay::state::{BlockIndex, BlockState};
use cowslip::overlay::storage::Storage;
use proptest::collection::vec;
use proptest::prelude::*;

const SIZE: u64 = 40_000;
const BLOCK: u32 = 4096;
const MENU: Menu = Menu { block: 4096, most: 60_000, resize: true, crash: false };

/// The states that disk 0 may have after a crash.
struct Left {
    /// Model after a power cut.
    power: Model,
    /// Model after a kill: all acknowledged changes, and any part of the others.
    kill: Model,
}

/// Performs `ops` until the power of disk 0 is cut or all are done.
fn play(target: &mut SimDisks, models: &mut [Model; 2], ops: &[Op]) -> Left {
    for op in ops {
        let op = op.fit(models, MENU);
        let mut after = models.clone();
        apply(&mut after, &op);
        let mut during = models.clone();
        during.iter_mut().for_each(Model::synced);
        apply(&mut during, &op);
        match perform(target, &op, models) {
            Ok(()) => *models = after,
            Err(error) => {
                assert!(target.0[0].layer.host.is_off(), "{op:?}: {error}");
                let ([power, _], [kill, _]) = (after, during);
                return Left { power, kill };
            }
        }
        match op {
            Op::Sync { disk } => models[disk].synced(),
            Op::Restart { .. } => models.iter_mut().for_each(Model::synced),
            _ => {}
        }
    }
    let mut kill = models[0].clone();
    kill.synced();
    Left { power: models[0].clone(), kill }
}

fn legal(model: &Model, disk: &SimDisk, what: &str) {
    model.check_legal(&disk.read_all()).unwrap_or_else(|wrong| panic!("{what}: {wrong}"));
}

/// Checks `disk` after a kill and after the power cuts `seeds`, and that each resulting state can
/// be used.
fn check_ends(disk: &SimDisk, left: &Left, seeds: std::ops::Range<u64>, what: &str) {
    let (killed, recovered) = disk.after_kill().unwrap_or_else(|e| panic!("{what}, killed: {e}"));
    assert!(matches!(recovered, Recovered::All | Recovered::Clean), "{what}: {recovered:?}");
    legal(&left.kill, &killed, &format!("{what}, killed"));
    goes_on(killed, &format!("{what}, killed, again"));
    for seed in seeds {
        let what = format!("{what}, seed {seed}");
        let (found, _) = disk.after_power_cut(seed).unwrap_or_else(|e| panic!("{what}: {e}"));
        disk.check_not_punched(&found);
        legal(&left.power, &found, &what);
        goes_on(found, &format!("{what}, again"));
    }
}

/// Checks that a recovered disk is unchanged by another power cut, and keeps what is synced
/// afterwards, whether freed space was given back or not.
fn goes_on(mut disk: SimDisk, what: &str) {
    let found = disk.read_all();
    let (again, _) = disk.after_power_cut(7).unwrap_or_else(|error| panic!("{what}: {error}"));
    assert!(again.read_all() == found, "{what}: another cut changed it");
    let mut model = disk.model();
    if model.size() > 600 {
        disk.write(&[0xAB; 300], 200).unwrap();
        model.write(200, &[0xAB; 300]);
    }
    disk.overlay().sync().unwrap();
    model.synced();
    disk.check_given_back();
    let (again, _) = disk.after_power_cut(8).unwrap_or_else(|error| panic!("{what}: {error}"));
    legal(&model, &again, what);
}

/// Creates two disks over a base with data and holes; disk 0 is the one that crashes.
fn pair() -> (SimDisks, [Model; 2]) {
    let base = Arc::new(TestBase::new(SIZE - 700, &[(20, 5), (3, 9)]));
    let disks = [0, 1].map(|_| SimDisk::persistent(&base, SIZE, BLOCK, None));
    let models = [0, 1].map(|disk: usize| disks[disk].model());
    (SimDisks(disks), models)
}

fn write(offset: u64, len: u64, fill: u8) -> Op {
    Op::Write { disk: 0, offset, len, fill }
}

/// Returns a short script with every operation of an overlay.
fn script() -> Vec<Op> {
    let sync = || Op::Sync { disk: 0 };
    let (zero, punch) = (|range| Op::Zero { disk: 0, range }, |range| Op::Punch { disk: 0, range });
    let truncate = |size| Op::Truncate { disk: 0, size };
    vec![
        write(0, 8192, 1),
        write(9000, 100, 2),
        sync(),
        write(100, 5000, 3),
        punch(0..4096),
        write(16_000, 9000, 4),
        sync(),
        // Frees a block, writes it again and frees it again, around a sync.
        punch(16_384..24_576),
        write(17_000, 10, 5),
        sync(),
        punch(16_384..24_576),
        write(16_384, 4096, 6),
        punch(16_384..20_480),
        sync(),
        truncate(18_000),
        truncate(30_000),
        write(20_000, 3000, 7),
        sync(),
        zero(5000..21_000),
        truncate(3000),
        sync(),
        write(50_000, 5000, 8),
        Op::Copy { from: 0, range: 50_000..54_000, to: 0, offset: 0 },
        Op::Restart { end: End::Clean },
        write(0, 512, 9),
        punch(49_152..53_248),
        sync(),
        write(49_152, 4096, 10),
        Op::Restart { end: End::Kill },
        write(700, 10, 11),
        sync(),
    ]
}

#[test]
fn power_cut_at_every_storage_operation_keeps_all_promises() {
    let mut cut = 0;
    loop {
        let (mut target, mut models) = pair();
        let host = Arc::clone(&target.0[0].layer.host);
        let start = host.steps();
        host.cut_at(start + cut);
        let left = play(&mut target, &mut models, &script());
        check_ends(&target.0[0], &left, 0..6, &format!("cut {cut}"));
        if !host.is_off() {
            break;
        }
        cut += 1;
    }
    assert!(cut > 60, "the script had only {cut} storage operations");
}

/// Returns a script of small syncs, most of which go to the journal.
fn small_syncs() -> Vec<Op> {
    let sync = || Op::Sync { disk: 0 };
    let punch = |range| Op::Punch { disk: 0, range };
    let truncate = |size| Op::Truncate { disk: 0, size };
    vec![
        write(0, 4096, 1),
        sync(),
        write(4096, 100, 2),
        sync(),
        // Overwrites: the bytes in older journal entries must not come back.
        write(0, 4096, 3),
        sync(),
        write(8192, 8192, 4),
        write(4100, 10, 5),
        sync(),
        sync(),
        write(0, 600, 6),
        // Zeros inside a block, and beyond the end.
        Op::Zero { disk: 0, range: 8200..8300 },
        sync(),
        write(37_000, 2900, 6),
        sync(),
        truncate(38_000),
        truncate(39_500),
        sync(),
        write(0, 700, 7),
        // A complete sync, since there is space to give back; then entries of a new generation.
        punch(4096..8192),
        sync(),
        write(4096, 10, 7),
        sync(),
        write(0, 4096, 8),
        sync(),
        truncate(20_000),
        truncate(30_000),
        sync(),
        write(18_000, 3000, 9),
        sync(),
        write(21_000, 512, 10),
        sync(),
        punch(16_384..24_576),
        write(16_384, 4096, 11),
        sync(),
        write(20_480, 10, 12),
        sync(),
        write(100, 10, 13),
        sync(),
        write(20_490, 10, 14),
        sync(),
        write(100, 10, 15),
    ]
}

#[test]
fn power_cut_at_every_storage_operation_of_small_syncs_keeps_all_promises() {
    cut_small_syncs(None);
}

#[test]
fn small_syncs_are_durable_after_a_close_or_a_recovery() {
    for end in [End::Clean, End::Kill, End::PowerCut(3)] {
        cut_small_syncs(Some(end));
    }
}

/// Cuts the power at every storage operation of small syncs. The overlay is new, or has been
/// restarted with `end`.
fn cut_small_syncs(end: Option<End>) {
    let mut cut = 0;
    loop {
        let (mut target, mut models) = pair();
        target.0[0].accustom();
        if let Some(end) = end {
            // The last syncs before the restart are journal entries as well.
            play(&mut target, &mut models, &[write(8192, 100, 90), Op::Sync { disk: 0 }]);
            play(&mut target, &mut models, &[write(8192, 10, 91), Op::Sync { disk: 0 }]);
            play(&mut target, &mut models, &[Op::Restart { end }]);
            target.0[0].accustom();
        }
        let host = Arc::clone(&target.0[0].layer.host);
        host.cut_at(host.steps() + cut);
        let left = play(&mut target, &mut models, &small_syncs());
        check_ends(&target.0[0], &left, 0..6, &format!("cut {cut}"));
        if !host.is_off() {
            break;
        }
        cut += 1;
    }
    assert!(cut > 40, "the script had only {cut} storage operations");
}

#[test]
fn power_cut_during_a_journal_recovery_is_recovered_from() {
    let (mut target, mut models) = pair();
    target.0[0].accustom();
    play(&mut target, &mut models, &small_syncs());
    for seed in 0..10 {
        let mut cut = 0;
        loop {
            let layer = target.0[0].layer.power_cut(seed);
            layer.host.cut_at(layer.host.steps() + cut);
            let opened = SimDisk::open(layer.clone(), &target.0[0].base, 2, None);
            let is_cut = layer.host.is_off();
            assert!(is_cut || opened.is_ok() && !layer.home.has_journal(), "it is empty again");
            drop(opened);
            let again = layer.power_cut(seed + cut);
            let (found, _) = SimDisk::open(again, &target.0[0].base, 3, None).unwrap();
            legal(&models[0], &found, &format!("seed {seed}, cut {cut}"));
            if !is_cut {
                break;
            }
            cut += 1;
        }
        assert!(cut > 5, "the recovery had only {cut} storage operations");
    }
}

#[test]
fn failed_journal_is_abandoned_and_syncs_continue() {
    for (deed, code) in [(Deed::Write, libc::ENOSPC), (Deed::Sync, libc::EIO)] {
        let (mut target, mut models) = pair();
        target.0[0].accustom();
        play(&mut target, &mut models, &small_syncs()[..6]);
        target.0[0].layer.host.fail(Role::Journal, deed, 0, code);
        play(&mut target, &mut models, &small_syncs()[6..]);
        assert!(!target.0[0].overlay().is_latched());
        for seed in 0..6 {
            legal(&models[0], &target.0[0].after_power_cut(seed).unwrap().0, "power cut");
        }
    }
}

/// Generates operations on few blocks, so that the same blocks are freed and written repeatedly.
fn crowded() -> BoxedStrategy<Vec<Op>> {
    let block = || 0u64..4;
    let one = prop_oneof![
        3 => (block(), 1u64..3, 1u8..9).prop_map(|(at, len, fill)| write(at * 4096, len * 4096, fill)),
        2 => (block(), 0u64..4096, 1u64..600, 1u8..9)
            .prop_map(|(at, by, len, fill)| write(at * 4096 + by, len, fill)),
        4 => (block(), 1u64..3)
            .prop_map(|(at, len)| Op::Punch { disk: 0, range: at * 4096..(at + len) * 4096 }),
        3 => Just(Op::Sync { disk: 0 }),
        1 => (1u64..5).prop_map(|blocks| Op::Truncate { disk: 0, size: blocks * 4096 + 100 }),
        1 => prop_oneof![Just(End::Clean), Just(End::Kill)].prop_map(|end| Op::Restart { end }),
    ];
    vec(one, 1..40).boxed()
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_script_cut_anywhere_keeps_all_promises(
        mut ops in prop_oneof![vec(op(MENU), 1..30), crowded()],
        cut in 0u64..120, seed: u64, is_accustomed: bool,
    ) {
        // Space from an explicit allocation is never given back, which `check_given_back` would
        // report.
        ops.retain(|op| !matches!(op, Op::Allocate { .. }));
        let (mut target, mut models) = pair();
        if is_accustomed {
            target.0[0].accustom();
        }
        let host = Arc::clone(&target.0[0].layer.host);
        host.cut_at(host.steps() + cut);
        let left = play(&mut target, &mut models, &ops);
        check_ends(&target.0[0], &left, seed..seed.saturating_add(3), "cut");
    }

    #[test]
    fn failed_sync_latches_and_keeps_the_last_synced_state(
        before in crowded(), after in crowded(), role in prop_oneof![Just(Role::Data), Just(Role::Log)],
        code in prop_oneof![Just(libc::EIO), Just(libc::ENOSPC)], times in 1u64..3, seed: u64,
        is_accustomed: bool,
    ) {
        let (mut target, mut models) = pair();
        if is_accustomed {
            target.0[0].accustom();
        }
        play(&mut target, &mut models, &before);
        let unsynced: Vec<Op> = after.into_iter()
            .filter(|op| !matches!(op, Op::Sync { .. } | Op::Restart { .. })).collect();
        // Makes sure that there is something to sync.
        play(&mut target, &mut models, &unsynced);
        play(&mut target, &mut models, &[write(0, 4096, 3), Op::Punch { disk: 0, range: 0..4096 }]);
        let disk = &mut target.0[0];
        for pass in 0..times {
            disk.layer.host.fail(role, Deed::Sync, pass, code);
        }
        let eio = |result: std::io::Result<()>| result.unwrap_err().raw_os_error() == Some(libc::EIO);
        prop_assert!(eio(disk.overlay().sync()));
        prop_assert!(disk.overlay().is_latched());
        prop_assert!(eio(disk.write(&[1], 0)));
        prop_assert!(eio(disk.overlay().sync()), "a latched sync succeeded");
        prop_assert!(eio(disk.zero(0..4096)));
        prop_assert!(eio(disk.truncate(1)));
        prop_assert!(disk.overlay().close().is_err());
        models[0].check_same(&disk.read_all()).unwrap();

        let (killed, recovered) = disk.after_kill().unwrap();
        let is_vouched = matches!(recovered, Recovered::Vouched { .. });
        prop_assert!(is_vouched, "{:?}", recovered);
        legal(&models[0], &killed, "killed");
        goes_on(killed, "killed");
        let (found, _) = disk.after_power_cut(seed).unwrap();
        legal(&models[0], &found, "power cut");
        goes_on(found, "power cut");
    }
}

#[test]
fn power_cut_after_a_sync_loses_nothing_and_reports_so() {
    let base = Arc::new(TestBase::solid(64 << 10));
    let cut = |disk: &SimDisk, seed| {
        let (found, recovered) = disk.after_power_cut(seed).unwrap();
        let Recovered::Vouched { lost } = recovered else { panic!("{recovered:?}") };
        (found, lost)
    };
    for is_accustomed in [false, true] {
        let mut disk = SimDisk::persistent(&base, 64 << 10, 4096, None);
        if is_accustomed {
            disk.accustom();
        }
        for turn in 0..4 {
            disk.write(&[turn; 100], u64::from(turn) * 8192).unwrap();
            disk.zero(4096..8192).unwrap();
            disk.overlay().sync().unwrap();
            for seed in 0..8 {
                let (found, lost) = cut(&disk, seed);
                assert_eq!(lost, 0, "turn {turn}, seed {seed}");
                assert!(found.read_all() == disk.read_all());
                // Opened but not changed: there is nothing to lose.
                assert_eq!(cut(&found, seed).1, 0, "opened again");
            }
            // Overwritten in place: the map does not change.
            disk.write(&[turn; 50], 10).unwrap();
            assert_eq!(cut(&disk, 1).1, 0);
        }
        disk.overlay().close().unwrap();
        let (reopened, _) = disk.after_kill().unwrap();
        assert_eq!(cut(&reopened, 2).1, 0, "opened after a good end");
        disk = reopened;
        disk.write(&[9; 4096], 5 * 8192).unwrap();
        disk.write(&[9; 4096], 6 * 8192).unwrap();
        let most = (0..32).map(|seed| cut(&disk, seed).1).max();
        assert_eq!(most, Some(2), "what was not synced counts");
    }
}

#[test]
fn failed_sync_at_recovery_is_treated_as_a_power_cut() {
    for seed in 0..20 {
        let (mut target, mut models) = pair();
        play(&mut target, &mut models, &script()[..3]);
        play(&mut target, &mut models, &[write(0, 4096 + seed, 9), write(20_000, 5000, 9)]);
        let layer = target.0[0].layer.kill();
        layer.host.fail(Role::Data, Deed::Sync, 0, libc::EIO);
        let (found, recovered) = SimDisk::open(layer, &target.0[0].base, 1, None).unwrap();
        assert!(matches!(recovered, Recovered::Vouched { .. }), "{recovered:?}");
        legal(&models[0], &found, "recovered");
        goes_on(found, "recovered");
    }
}

#[test]
fn full_host_gives_enospc_without_a_latch_and_punching_frees_space() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
    disk.write(&[1; 16_384], 0).unwrap();
    disk.overlay().sync().unwrap();
    let host = Arc::clone(&disk.layer.host);
    host.set_capacity(Some(host.used() + 3 * SECTOR));
    let before = disk.read_all();
    for _ in 0..3 {
        let error = disk.write(&[2; 4096], 20_480).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    }
    assert!(!disk.overlay().is_latched());
    assert!(disk.read_all() == before, "a refused write changed something");
    // The part of the block that was written must not stay allocated either.
    disk.overlay().sync().unwrap();
    disk.check_given_back();
    disk.zero(0..8192).unwrap();
    // The punched space is given back when the next write needs it.
    disk.write(&[3; 8192], 20_480).unwrap();
    let mut model = Model::new(before);
    model.zero(0..8192);
    model.write(20_480, &[3; 8192]);
    model.check_same(&disk.read_all()).unwrap();
    disk.overlay().sync().unwrap();
    disk.check_given_back();
    model.synced();
    legal(&model, &disk.after_power_cut(1).unwrap().0, "power cut");
}

#[test]
fn log_reserve_is_left_to_punches_and_syncs() {
    let base = Arc::new(TestBase::solid(0));
    let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
    let host = Arc::clone(&disk.layer.host);
    disk.write(&[1; 4096], 4096).unwrap();
    disk.write(&[1; 4096], 0).unwrap();
    // The log cannot grow a second time, but there is space for any data.
    let used = host.used();
    let mut refused = None;
    for _ in 0..20_000 {
        host.set_capacity(Some(used + 64 * SECTOR));
        disk.zero(0..4096).unwrap();
        if let Err(error) = disk.write(&[1; 4096], 0) {
            refused = Some(error.raw_os_error());
            break;
        }
    }
    assert_eq!(refused, Some(Some(libc::ENOSPC)), "the log never ran out of space");
    assert!(!disk.overlay().is_latched());
    disk.zero(4096..8192).unwrap();
    disk.overlay().sync().unwrap();
    let model = disk.model();
    legal(&model, &disk.after_power_cut(3).unwrap().0, "power cut");
    legal(&model, &disk.after_kill().unwrap().0, "killed");
}

/// Opens a copy of `disk` in `layer` on a host with `space` bytes, and gives it more space then. The power
/// may be cut before step `cut`.
fn open_full(
    disk: &SimDisk,
    layer: &SimLayer,
    life: u64,
    (space, cut): (u64, u64),
) -> Result<SimDisk, LogError> {
    let host = &layer.host;
    host.set_capacity(Some(space));
    host.cut_at(host.steps().saturating_add(cut));
    let opened = SimDisk::open(layer.clone(), &disk.base, life, None);
    host.set_capacity(None);
    let (found, _) = opened?;
    if host.is_off() {
        return Ok(found);
    }
    host.cut_at(u64::MAX);
    // Nothing that did not count is left for the next recovery.
    let (again, recovered) = found.after_kill()?;
    assert_eq!(recovered, Recovered::All);
    assert!(again.read_all() == found.read_all(), "a kill changed it");
    Ok(found)
}

/// Recovers `disk` on a full host after a kill and after power cuts: the recovery itself is cut at every
/// storage operation.
fn recover_full(disk: &SimDisk, left: &Left) {
    let states = (0..8).map(|seed| (disk.layer.power_cut(seed), 2, &left.power));
    for (start, life, model) in states.chain([(disk.layer.kill(), 1, &left.kill)]) {
        let space = start.host.used();
        for cut in 0.. {
            let layer = start.kill();
            let old = layer.home.log();
            let opened = open_full(disk, &layer, life, (space, cut));
            let what = format!("life {life}, cut {cut}");
            assert!(Arc::ptr_eq(&old, &layer.home.log()), "{what}: there was space for a new log");
            if !layer.host.is_off() {
                assert!(cut >= 2, "the recovery had only {cut} storage operations");
                let found = opened.unwrap_or_else(|error| panic!("{what}: {error}"));
                legal(model, &found, &what);
                goes_on(found, &what);
                break;
            }
            for seed in 0..4 {
                let again = open_full(disk, &layer.power_cut(seed), 9, (space, u64::MAX));
                legal(&left.power, &again.unwrap_or_else(|e| panic!("{what}: {e}")), &what);
            }
            let killed = open_full(disk, &layer.kill(), life, (space, u64::MAX));
            legal(model, &killed.unwrap_or_else(|e| panic!("{what}, killed: {e}")), &what);
            let (roomy, _) = SimDisk::open(layer.power_cut(5), &disk.base, 9, None).unwrap();
            legal(&left.power, &roomy, &what);
        }
    }
}

#[test]
fn recovery_on_a_full_host_cut_anywhere_keeps_all_promises() {
    let ops = script();
    for count in [4, 8, 14, 20, 22, 25, 27, ops.len()] {
        let (mut target, mut models) = pair();
        let left = play(&mut target, &mut models, &ops[..count]);
        recover_full(&target.0[0], &left);
    }
}

#[test]
fn recovery_of_a_journal_on_a_full_host_cut_anywhere_keeps_all_promises() {
    let ops = small_syncs();
    for count in [4, 8, 12, 16, 24, ops.len()] {
        let (mut target, mut models) = pair();
        target.0[0].accustom();
        let left = play(&mut target, &mut models, &ops[..count]);
        recover_full(&target.0[0], &left);
    }
}

#[test]
fn records_appended_during_the_last_sync_do_not_count_on_a_full_host() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, 512, None);
    disk.write(&[1; 4096], 0).unwrap();
    let mut model = disk.model();
    let host = Arc::clone(&disk.layer.host);
    host.hold(Role::Data, Deed::Sync);
    thread::scope(|scope| {
        let overlay = disk.overlay();
        let sync = scope.spawn(|| overlay.sync());
        host.wait_held(1);
        for at in 0..30 {
            overlay.write_at(&[2; 512], 8192 + at * 1024, &*base, Wait::Yes).unwrap();
        }
        overlay.zero(0..2048, &*base, Wait::Yes).unwrap();
        host.release();
        sync.join().unwrap().unwrap();
    });
    model.synced();
    for at in 0..30 {
        model.write(8192 + at * 1024, &[2; 512]);
    }
    model.zero(0..2048);
    let mut kill = model.clone();
    kill.synced();
    recover_full(&disk, &Left { power: model, kill });
}

#[test]
fn records_appended_after_the_last_sync_are_gone_for_good_on_a_full_host() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, 512, None);
    disk.write(&[1; 4096], 0).unwrap();
    disk.overlay().sync().unwrap();
    let mut model = disk.model();
    for at in 0..30 {
        disk.write(&[2; 512], 8192 + at * 1024).unwrap();
        model.write(8192 + at * 1024, &[2; 512]);
    }
    // A sync is cut before its `Vouch` is durable, which may stay behind a gap.
    let host = Arc::clone(&disk.layer.host);
    host.cut_at(host.steps() + 2);
    assert!(disk.overlay().sync().is_err());
    let mut kill = model.clone();
    kill.synced();
    recover_full(&disk, &Left { power: model, kill });
}

#[test]
fn disk_that_is_opened_on_a_full_host_can_be_emptied_and_closed() {
    let base = Arc::new(TestBase::solid(SIZE));
    // The last record of the log ends at each place of a sector.
    for more in 0..16 {
        let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
        disk.write(&[1; 16_384], 0).unwrap();
        (0..more).for_each(|turn| disk.overlay().record_mtime(turn, MtimeOrigin::Written).unwrap());
        disk.overlay().close().unwrap();
        let host = Arc::clone(&disk.layer.host);
        host.set_capacity(Some(host.used()));
        let (mut disk, _) = SimDisk::open(disk.layer.clone(), &base, 1, None).unwrap();
        let full = disk.write(&[2; 4096], 20_480).unwrap_err();
        assert_eq!(full.raw_os_error(), Some(libc::ENOSPC), "{more} more");
        disk.zero(0..16_384).unwrap_or_else(|error| panic!("{more} more: {error}"));
        disk.overlay().sync().unwrap();
        disk.check_given_back();
        disk.overlay().close().unwrap();
        let (again, recovered) = disk.after_kill().unwrap();
        assert_eq!(recovered, Recovered::Clean);
        assert!(again.read_all()[..16_384].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn append_without_room_for_all_of_it_leaves_nothing() {
    let layer = SimLayer::new(BLOCK);
    let mut map = LayerMap::new(SIZE, 0);
    for at in 0..12 {
        map.blocks.set(BlockIndex(at * 2)..BlockIndex(at * 2 + 1), BlockState::Zero);
    }
    let home = Arc::clone(&layer.home) as Arc<dyn LogDir>;
    let log = Log::create(home, layer.uuid, 4096, &map, BootTag([1; 2]), 1).unwrap();
    assert_eq!(layer.home.log().bytes().len(), 480, "the next record ends a sector");
    layer.host.set_capacity(Some(layer.host.used()));
    let two = [LogRecord::Intent, LogRecord::Done];
    let error = log.append(&two, record_log::ReserveUse::Full).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert_eq!(layer.home.log().bytes().len(), 480);
    log.append(&two[..1], record_log::ReserveUse::Full).unwrap();
}

/// Creates a disk with a long log: three syncs, then records that no Vouch covers. Also returns the
/// model since the second sync, and the number of records up to the second `Vouch`.
fn logged() -> (SimDisk, Model, u64) {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, 512, None);
    let mut model = disk.model();
    let mut known = 0;
    for round in 0..4u64 {
        for at in 0..40 {
            let offset = at * 7 % 71 * 512;
            // Always different from the previous round, so that every change adds a record.
            if (at + round) % 2 == 1 {
                disk.zero(offset..offset + 512).unwrap();
                model.zero(offset..offset + 512);
            } else {
                let bytes = [round as u8 * 16 + at as u8 + 1; 512];
                disk.write(&bytes, offset).unwrap();
                model.write(offset, &bytes);
            }
        }
        if round < 3 {
            disk.overlay().sync().unwrap();
        }
        if round == 1 {
            model.synced();
            known = written(&disk.layer.home.log().bytes()) as u64 / RECORD_LEN as u64;
        }
    }
    (disk, model, known)
}

/// Opens `disk` after `harm` has damaged its log. Returns the error, or `None` after checking that
/// `model` allows the state found.
fn with_harm(
    disk: &SimDisk,
    model: &Model,
    life: u64,
    harm: impl Fn(&crate::common::sim::SimFile),
) -> Option<LogError> {
    let layer = disk.layer.kill();
    harm(&layer.home.log());
    match SimDisk::open(layer, &disk.base, life, None) {
        Ok((found, _)) => {
            legal(model, &found, "harmed");
            None
        }
        Err(error) => Some(error),
    }
}

#[test]
fn flipped_byte_in_the_log_is_rejected_or_gives_an_older_state() {
    let (disk, model, known) = logged();
    let log = disk.layer.home.log();
    let bytes = log.bytes();
    let len = written(&bytes) as u64;
    for at in 0..len {
        for life in [1, 2] {
            let found = with_harm(&disk, &model, life, |log| {
                log.damage(at, &[bytes[at as usize] ^ 0x20]);
            });
            let is_damaged = matches!(found, Some(LogError::Damaged { .. }));
            let is_last = at / RECORD_LEN as u64 + 1 == len / RECORD_LEN as u64;
            assert!(is_damaged || is_last, "byte {at}, life {life}: {found:?}");
            assert!(is_damaged || at / RECORD_LEN as u64 >= known, "byte {at} was durable");
        }
    }
}

#[test]
fn lost_log_sector_is_damage_unless_a_power_cut_explains_it() {
    let (disk, model, known) = logged();
    let len = written(&disk.layer.home.log().bytes()) as u64;
    let mut gaps = 0;
    for at in (0..len).step_by(512) {
        let blank = |log: &crate::common::sim::SimFile| {
            log.damage(at, &vec![0; (len - at).min(512) as usize]);
        };
        let is_last = at + 512 >= len;
        let here = with_harm(&disk, &model, 1, blank);
        assert!(is_last || matches!(here, Some(LogError::Damaged { .. })), "sector {at}: {here:?}");
        let elsewhere = with_harm(&disk, &model, 2, blank);
        if at / (RECORD_LEN as u64) < known {
            assert!(
                matches!(elsewhere, Some(LogError::Damaged { .. })),
                "sector {at}: {elsewhere:?}"
            );
        } else {
            assert!(elsewhere.is_none(), "sector {at}: {elsewhere:?}");
            gaps += 1;
        }
    }
    assert!(gaps > 2);
}

#[test]
fn truncated_log_gives_an_older_state_or_is_rejected() {
    let (disk, model, known) = logged();
    let len = written(&disk.layer.home.log().bytes()) as u64;
    // A truncated log looks like one whose tail was lost in a power cut: the records that prove
    // durability are lost as well.
    assert!(with_harm(&disk, &model, 2, |log| log.cut(40)).is_some(), "no vouch is left");
    for to in known * RECORD_LEN as u64..len {
        let found = with_harm(&disk, &model, 2, |log| log.cut(to));
        assert!(found.is_none(), "cut to {to}: {found:?}");
    }
}

#[test]
fn record_of_a_newer_version_is_rejected_with_the_version() {
    let (disk, model, _) = logged();
    let len = written(&disk.layer.home.log().bytes()) as u64;
    let mut bytes = LogRecord::Close.encode(&disk.layer.uuid, 1000);
    bytes[4] = 200;
    let crc = crc32c::crc32c_append(crc32c::crc32c(disk.layer.uuid.as_bytes()), &bytes[4..]);
    bytes[..4].copy_from_slice(&crc.to_le_bytes());
    for life in [1, 2] {
        let found = with_harm(&disk, &model, life, |log| log.damage(len, &bytes));
        assert!(matches!(found, Some(LogError::Newer(200))), "{found:?}");
    }
}

/// Creates a disk with data and unsynced changes, whose log is long enough to be compacted.
fn long() -> (SimDisk, Model) {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, 512, None);
    for round in 0..33_000u32 {
        disk.write(&[round as u8; 512], 512).unwrap();
        disk.zero(512..1024).unwrap();
    }
    disk.write(&[5; 3000], 10_000).unwrap();
    disk.overlay().sync().unwrap();
    let mut model = disk.model();
    disk.write(&[6; 2000], 20_000).unwrap();
    model.write(20_000, &[6; 2000]);
    (disk, model)
}

#[test]
fn power_cut_during_log_compaction_loses_nothing() {
    for cut in 0.. {
        let (mut disk, mut model) = long();
        let host = Arc::clone(&disk.layer.host);
        let before = written(&disk.layer.home.log().bytes()) as u64;
        let start = host.steps();
        host.cut_at(start + cut);
        let done = disk.overlay().maintain().is_ok();
        let is_shorter = (written(&disk.layer.home.log().bytes()) as u64) < before / 10;
        if !host.is_off() {
            assert!(done && is_shorter, "the log was not reduced");
            host.cut_at(u64::MAX);
            model.synced();
            let mut after = model.clone();
            disk.write(&[7; 100], 10_000).unwrap();
            disk.zero(20_480..20_992).unwrap();
            after.write(10_000, &[7; 100]);
            after.zero(20_480..20_992);
            let mut kill = after.clone();
            kill.synced();
            check_ends(&disk, &Left { power: after, kill }, 0..6, "reduced");
            assert!(cut > 6, "only {cut} operations");
            break;
        }
        let mut kill = model.clone();
        kill.synced();
        check_ends(&disk, &Left { power: model, kill }, 0..4, &format!("cut {cut}"));
    }
}

#[test]
fn overlay_latches_if_the_rename_of_its_new_log_is_not_durable() {
    let (mut disk, mut model) = long();
    disk.layer.host.fail(Role::Dir, Deed::Sync, 0, libc::EIO);
    disk.overlay().maintain().unwrap();
    model.synced();
    disk.write(&[8; 600], 30_000).unwrap();
    model.write(30_000, &[8; 600]);
    assert!(disk.overlay().sync().is_err(), "the power could bring the old log back");
    assert!(disk.overlay().is_latched());
    for seed in 0..10 {
        legal(&model, &disk.after_power_cut(seed).unwrap().0, "power cut");
    }
    legal(&model, &disk.after_kill().unwrap().0, "killed");
}

#[test]
fn failed_log_compaction_keeps_the_old_log() {
    for (role, deed) in
        [(Role::Log, Deed::Write), (Role::Log, Deed::Sync), (Role::Dir, Deed::Rename)]
    {
        let (mut disk, mut model) = long();
        // The first write and sync of the log belong to the Vouch before the compaction.
        disk.layer.host.fail(role, deed, u64::from(role == Role::Log), libc::ENOSPC);
        disk.overlay().maintain().unwrap();
        model.synced();
        disk.write(&[9; 100], 0).unwrap();
        model.write(0, &[9; 100]);
        disk.overlay().sync().unwrap();
        model.synced();
        legal(&model, &disk.after_power_cut(5).unwrap().0, "power cut");
        legal(&model, &disk.after_kill().unwrap().0, "killed");
    }
}

#[test]
fn power_cut_during_a_recovery_leaves_the_same_overlay() {
    let (mut target, mut models) = pair();
    play(&mut target, &mut models, &script()[..14]);
    play(&mut target, &mut models, &[write(30_000, 3000, 1)]);
    let disk = &target.0[0];
    for cut in 0.. {
        let layer = disk.layer.kill();
        layer.host.cut_at(cut);
        let opened = SimDisk::open(layer.clone(), &disk.base, 1, None);
        for seed in 0..4 {
            let (found, _) = SimDisk::open(layer.power_cut(seed), &disk.base, 9, None).unwrap();
            legal(&models[0], &found, &format!("cut {cut}"));
        }
        let (found, _) = SimDisk::open(layer.kill(), &disk.base, 1, None).unwrap();
        models[0].check_same(&found.read_all()).unwrap();
        if opened.is_ok() {
            assert!(cut >= 5, "recovery took only {cut} operations");
            break;
        }
    }
}

#[test]
fn open_record_lost_in_a_power_cut_is_not_damage() {
    // A log that was closed, continued, and cut during its first sync. In one of the sixteen runs
    // the Open record begins a sector.
    let base = Arc::new(TestBase::solid(SIZE));
    for before in 0..16 {
        let mut disk = SimDisk::persistent(&base, SIZE, 512, None);
        for at in 0..before {
            disk.write(&[1; 512], at * 1024).unwrap();
        }
        disk.overlay().close().unwrap();
        let (mut disk, _) = SimDisk::open(disk.layer.clone(), &base, 1, None).unwrap();
        let mut model = disk.model();
        for at in 0..40 {
            disk.write(&[2; 512], at * 512).unwrap();
            model.write(at * 512, &[2; 512]);
        }
        let host = Arc::clone(&disk.layer.host);
        host.cut_at(host.steps() + 2);
        assert!(disk.overlay().sync().is_err());
        for seed in 0..20 {
            let (found, _) = disk.after_power_cut(seed).unwrap();
            legal(&model, &found, &format!("{before} before, seed {seed}"));
        }
    }
}

#[test]
fn block_written_while_its_freed_space_awaits_a_sync_keeps_its_data() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
    disk.write(&[1; 8192], 0).unwrap();
    disk.overlay().sync().unwrap();
    let mut model = disk.model();
    disk.zero(0..8192).unwrap();
    model.zero(0..8192);
    let host = Arc::clone(&disk.layer.host);
    host.hold(Role::Data, Deed::Sync);
    thread::scope(|scope| {
        let overlay = disk.overlay();
        let sync = scope.spawn(|| overlay.sync());
        host.wait_held(1);
        overlay.write_at(&[2; 4096], 0, &*base, Wait::Yes).unwrap();
        overlay.write_at(&[3; 100], 5000, &*base, Wait::Yes).unwrap();
        overlay.zero(4096..8192, &*base, Wait::Yes).unwrap();
        host.release();
        sync.join().unwrap().unwrap();
    });
    // The sync covers only the first zeros, so each sector may hold any of the three versions.
    model.synced();
    model.write(0, &[2; 4096]);
    model.write(5000, &[3; 100]);
    model.zero(4096..8192);
    model.check_same(&disk.read_all()).unwrap();
    for seed in 0..30 {
        legal(&model, &disk.after_power_cut(seed).unwrap().0, &format!("seed {seed}"));
    }
}

#[test]
fn space_freed_during_a_sync_is_punched_by_the_next_sync() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
    disk.write(&[1; 12_288], 0).unwrap();
    disk.overlay().sync().unwrap();
    disk.zero(0..4096).unwrap();
    let host = Arc::clone(&disk.layer.host);
    host.hold(Role::Data, Deed::Sync);
    thread::scope(|scope| {
        let overlay = disk.overlay();
        let sync = scope.spawn(|| overlay.sync());
        host.wait_held(1);
        overlay.zero(4096..8192, &*base, Wait::Yes).unwrap();
        // Freed earlier, written, and freed again: the later record counts.
        overlay.write_at(&[2; 4096], 0, &*base, Wait::Yes).unwrap();
        overlay.zero(0..4096, &*base, Wait::Yes).unwrap();
        host.release();
        sync.join().unwrap().unwrap();
    });
    assert!(disk.layer.data.is_allocated(&(4096..8192)), "the record is not durable yet");
    for seed in 0..10 {
        disk.check_not_punched(&disk.after_power_cut(seed).unwrap().0);
    }
    disk.overlay().sync().unwrap();
    assert!(!disk.layer.data.is_allocated(&(0..8192)));
    assert!(disk.layer.data.is_allocated(&(8192..12_288)));
}

#[test]
fn write_waits_for_a_punch_of_the_same_block() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
    disk.write(&[1; 4096], 0).unwrap();
    disk.zero(0..4096).unwrap();
    let host = Arc::clone(&disk.layer.host);
    host.hold(Role::Data, Deed::Punch);
    thread::scope(|scope| {
        let overlay = disk.overlay();
        let sync = scope.spawn(|| overlay.sync());
        host.wait_held(1);
        let busy = overlay.write_at(&[2; 4096], 0, &*base, Wait::No).unwrap_err();
        assert_eq!(busy.raw_os_error(), Some(libc::EAGAIN));
        let write = scope.spawn(|| overlay.write_at(&[2; 4096], 0, &*base, Wait::Yes));
        host.release();
        sync.join().unwrap().unwrap();
        write.join().unwrap().unwrap();
    });
    assert!(disk.read_all()[..4096].iter().all(|byte| *byte == 2));
}

#[test]
fn freed_space_is_not_punched_during_a_read() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
    disk.write(&[1; 4096], 0).unwrap();
    let host = Arc::clone(&disk.layer.host);
    host.hold(Role::Data, Deed::Read);
    thread::scope(|scope| {
        let read = scope.spawn(|| {
            let mut buf = [0; 4096];
            cowslip::layer::Layer::read_at(disk.overlay(), &mut buf, 0, Wait::Yes).unwrap();
            buf
        });
        host.wait_held(1);
        disk.overlay().zero(0..4096, &*base, Wait::Yes).unwrap();
        let sync = scope.spawn(|| disk.overlay().sync());
        thread::sleep(std::time::Duration::from_millis(30));
        assert!(disk.layer.data.is_allocated(&(0..4096)), "punched under a reader");
        host.release();
        assert!(read.join().unwrap().iter().all(|byte| *byte == 1));
        sync.join().unwrap().unwrap();
    });
    assert!(!disk.layer.data.is_allocated(&(0..4096)));
}

#[test]
fn write_that_a_concurrent_sync_missed_leaves_the_overlay_dirty() {
    let base = Arc::new(TestBase::solid(SIZE));
    let mut disk = SimDisk::persistent(&base, SIZE, BLOCK, None);
    disk.write(&[1; 4096], 0).unwrap();
    let host = Arc::clone(&disk.layer.host);
    host.hold(Role::Data, Deed::Write);
    thread::scope(|scope| {
        let overlay = disk.overlay();
        let write = scope.spawn(|| overlay.write_at(&[2; 4096], 0, &*base, Wait::Yes));
        host.wait_held(1);
        overlay.sync().unwrap();
        host.release();
        write.join().unwrap().unwrap();
    });
    assert!(disk.overlay().is_dirty(), "the background would never sync it");
}

#[test]
fn log_scan_includes_sequence_numbers_after_a_gap() {
    let (disk, ..) = logged();
    let log = disk.layer.home.log();
    let whole = record_log::scan(&*log, &disk.layer.uuid).unwrap();
    let len = written(&log.bytes()) as u64;
    log.damage(len - 512 - len % 512, &[0; 512]);
    let gap = record_log::scan(&*log, &disk.layer.uuid).unwrap();
    assert!(gap.good < whole.good);
    assert_eq!(gap.highest, whole.highest, "a sequence could be used twice");
}

#[test]
fn reads_and_writes_cross_segment_boundaries() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let file = move |index: usize| {
        let name = path.join(index.to_string());
        std::fs::File::options().read(true).write(true).create(true).truncate(false).open(name)
    };
    let first = file(0).unwrap();
    let data = HostFile::segmented(first, Vec::new(), Box::new(file));
    let read = |from: u64, len: usize| {
        let mut buf = vec![0xEE; len];
        data.read_at(&mut buf, from, Wait::Yes).unwrap();
        buf
    };
    assert_eq!(read(SEGMENT_LEN - 10, 20), [0; 20], "what was never written is zeros");
    let bytes: Vec<u8> = (1..=200).collect();
    let parts = [IoSlice::new(&bytes[..30]), IoSlice::new(&bytes[30..])];
    data.write_at(&parts, SEGMENT_LEN - 100).unwrap();
    assert_eq!(read(SEGMENT_LEN - 100, 200), bytes);
    assert_eq!(read(SEGMENT_LEN, 100), bytes[100..]);
    assert_eq!(data.len().unwrap(), SEGMENT_LEN + 100);
    data.punch_hole(SEGMENT_LEN - 50..SEGMENT_LEN + 50).unwrap();
    let mut punched = bytes.clone();
    punched[50..150].fill(0);
    assert_eq!(read(SEGMENT_LEN - 100, 200), punched);
    data.write_at(&[IoSlice::new(&[9; 10])], 3 * SEGMENT_LEN + 5).unwrap();
    assert_eq!(read(3 * SEGMENT_LEN, 20), [[0; 5].as_slice(), &[9; 10], &[0; 5]].concat());
    assert_eq!(read(2 * SEGMENT_LEN, 20), [0; 20]);
    data.sync().unwrap();
    assert_eq!(data.segments().unwrap().len(), 3);
    assert!(data.host_fd(SEGMENT_LEN - 1..SEGMENT_LEN).is_some());
    assert!(data.host_fd(SEGMENT_LEN - 1..SEGMENT_LEN + 1).is_none());
}

#[test]
fn simulated_power_cut_stops_all_files_and_is_deterministic() {
    // A test of the simulation itself: a power cut without effect would prove nothing.
    let (mut target, mut models) = pair();
    play(&mut target, &mut models, &[write(0, 4096, 1), Op::Sync { disk: 0 }, write(0, 4096, 2)]);
    let disk = &target.0[0];
    let left: Vec<Vec<u8>> = (0..8).map(|seed| disk.layer.power_cut(seed).data.bytes()).collect();
    assert!(left.iter().any(|bytes| *bytes != left[0]), "every cut left the same");
    assert_eq!(left[3], disk.layer.power_cut(3).data.bytes());
    let host = Arc::clone(&disk.layer.host);
    host.cut_at(host.steps());
    assert!(target.0[0].write(&[1], 0).is_err());
    assert!(Chance(1).below(3) < 3);
}
