//! Random operations over an image on a server, while the wire to it breaks all the time: not one
//! wrong byte, and no error, as no outage is as long as `io_timeout`.
//!
//! Connections are cut at random places, all at once or refused for a while; nothing passes for a
//! while; the server is killed and started again. Nothing is flipped: plain NBD has no checksums.
//!
//! `COWSLIP_SEED=N` makes the same choices again, at other moments; `COWSLIP_STEPS=N` makes more of
//! them (`contrib/soak`).

// The time fits, for half a million years.
#![allow(clippy::cast_possible_truncation)]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::FallocateFlags;

use crate::common::mount::*;
use crate::common::random::{Dice, check, whole};
use crate::common::support::{Protocol, Proxy};

const SIZE: u64 = 12 * MIB;
/// The mounts of one overlay, after which most of the disk is in it.
const MOUNTS: u64 = 3;
/// The operations on one mount.
const STEPS: u64 = 60;
/// How far a connection gets at the least, in bytes: the image is recognized by 384 KiB of samples on each of
/// them, without which no connection is of any use.
const USEFUL: u64 = 450_000;

/// The number in an environment variable.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// A start for a random number generator, which must not be 0.
fn spread(seed: u64) -> u64 {
    seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

/// qemu-nbd at the socket `nbd.sock`, with the image `base.img`.
fn serve(lab: &Lab) -> Running {
    let _ = std::fs::remove_file(lab.path("nbd.sock"));
    let mut command = lab.command("qemu-nbd");
    command.args(["--persistent", "--shared=0", "-r", "-f", "raw", "-k"]).arg(lab.path("nbd.sock"));
    command.arg(lab.path("base.img")).stdout(Stdio::null()).stderr(Stdio::null());
    let server = Running(command.spawn().unwrap());
    wait_until("the server listens", || {
        std::os::unix::net::UnixStream::connect(lab.path("nbd.sock")).is_ok()
    });
    server
}

/// Breaks the wire in all ways until `is_over`, and leaves it whole. No outage lasts a second.
fn make_trouble(
    lab: &Lab,
    proxy: &Proxy,
    server: &mut Running,
    dice: &mut Dice,
    is_over: &AtomicBool,
) {
    let control = &proxy.control;
    let pause = |dice: &mut Dice, most| thread::sleep(Duration::from_millis(dice.below(most)));
    while !is_over.load(Ordering::SeqCst) {
        match dice.below(8) {
            0 => control.cut_all(),
            1 => {
                // Too short for any use: an outage.
                control.cut_after.store(1 + dice.below(65_536), Ordering::SeqCst);
                control.cut_all();
                pause(dice, 300);
            }
            2 => {
                control.stalled_below.store(usize::MAX, Ordering::SeqCst);
                pause(dice, 700);
                control.stalled_below.store(0, Ordering::SeqCst);
            }
            3 => {
                control.refuses.store(true, Ordering::SeqCst);
                control.cut_all();
                pause(dice, 300);
                control.refuses.store(false, Ordering::SeqCst);
            }
            4 => {
                server.0.kill().unwrap();
                server.0.wait().unwrap();
                pause(dice, 100);
                *server = serve(lab);
            }
            _ => {}
        }
        control.cut_after.store(USEFUL + dice.below(2 * USEFUL), Ordering::SeqCst);
        pause(dice, 120);
    }
    control.cut_after.store(0, Ordering::SeqCst);
}

/// One random operation, mostly a read of what was not fetched yet or a write of parts of blocks.
fn step(dice: &mut Dice, file: &File, model: &mut [u8]) {
    let range = dice.range(SIZE);
    let bytes = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
    match dice.below(12) {
        0..3 => {
            let data = noise(range.end - range.start, dice.below(u64::MAX));
            file.write_all_at(&data, range.start).unwrap();
            model[bytes].copy_from_slice(&data);
        }
        3..5 => {
            let short = dice.below(600).min(range.end - range.start);
            let data = noise(short, dice.below(u64::MAX));
            file.write_all_at(&data, range.start).unwrap();
            model[bytes.start..bytes.start + data.len()].copy_from_slice(&data);
        }
        5 => {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(file, punch, range).unwrap();
            model[bytes].fill(0);
        }
        6 => file.sync_all().unwrap(),
        _ => {
            let found = read(file, range.start, range.end - range.start);
            assert!(found == model[bytes], "the bytes of {range:?} differ");
        }
    }
}

#[test]
fn a_wire_that_breaks_all_the_time_costs_no_byte() {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = number("COWSLIP_SEED").unwrap_or(now.as_micros() as u64);
    let steps = number("COWSLIP_STEPS").unwrap_or(MOUNTS * STEPS);
    eprintln!("COWSLIP_SEED={seed}");
    let mut lab = Lab::new();
    put(&lab.path("base.img"), &noise(SIZE, 5));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&lab.open("base.img"), punch, 3 * MIB + 4096..5 * MIB).unwrap();
    lab.watch("base.img");
    let mut server = serve(&lab);
    let proxy = Proxy::unix(&lab.path("nbd.sock"), Protocol::Nbd).unwrap();
    let source = format!("nbd+unix:///?socket={}", proxy.socket().display());
    let image = whole(&lab, "base.img");
    let (mut dice, mut trouble) = (Dice(spread(seed)), Dice(spread(!seed)));
    for overlay in 0..steps.div_ceil(MOUNTS * STEPS) {
        let mut model = image.clone();
        let disk = format!("-o io_timeout=30 d={source},overlay=o{overlay},fetch=32K,conns=3");
        let before = proxy.control.connections.load(Ordering::SeqCst);
        for mount in 0..MOUNTS {
            // With nothing fetched, but for what the overlay has by now.
            lab.mount(&disk);
            let file = lab.open("m/d");
            let is_over = AtomicBool::new(false);
            thread::scope(|scope| {
                // Also when an operation panics: the scope waits for its threads.
                let _ends = Ends(&is_over);
                scope.spawn(|| make_trouble(&lab, &proxy, &mut server, &mut trouble, &is_over));
                for _ in 0..STEPS {
                    step(&mut dice, &file, &mut model);
                }
                check(&file, &model);
            });
            check(&lab.open_ro("m/d"), &model);
            assert_eq!(lab.disk("d")["remote"]["failures"], 0);
            drop(file);
            if mount % 2 == 0 { lab.kill() } else { drop(lab.umount()) }
        }
        let connections = proxy.control.connections.load(Ordering::SeqCst) - before;
        assert!(connections > 6 * MOUNTS as usize, "too little was broken: {connections}");
    }
}
