//! Random operations over an image on a server, while the wire to it breaks all the time: not one
//! wrong byte, and no error, as no outage is as long as `io_timeout`.
//!
//! Connections are cut at random places, all at once or refused for a while; nothing passes for a
//! while; the server is killed and started again. Nothing is flipped: plain NBD and HTTP have no checksums.
//!
//! `COWSLIP_SEED=N` makes the same choices again, at other moments; `COWSLIP_STEPS=N` makes more of
//! them (`contrib/soak`).

// The time fits, for half a million years.
#![allow(clippy::cast_possible_truncation)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::FallocateFlags;

use crate::common::mount::*;
use crate::common::random::{Dice, check, whole};
use crate::common::support::{Endpoint, Protocol, Proxy};

const SIZE: u64 = 12 * MIB;
/// The mounts of one overlay, after which most of the disk is in it.
const MOUNTS: u64 = 3;
/// The operations on one mount.
const STEPS: u64 = 60;
/// The number in an environment variable.
fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text} is no number")))
}

/// A start for a random number generator, which must not be 0.
fn spread(seed: u64) -> u64 {
    seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

/// A server of `base.img` in a lab, at the socket `server.sock`.
struct Server<'a> {
    lab: &'a Lab,
    protocol: Protocol,
    running: Running,
}

impl<'a> Server<'a> {
    fn start(lab: &'a Lab, protocol: Protocol) -> Self {
        let running = Self::run(lab, protocol);
        Self { lab, protocol, running }
    }

    fn run(lab: &Lab, protocol: Protocol) -> Running {
        let socket = lab.path("server.sock");
        let _ = fs::remove_file(&socket);
        let mut command = match protocol {
            Protocol::Nbd => {
                let mut command = lab.command("qemu-nbd");
                command.args(["--persistent", "--shared=0", "-r", "-f", "raw", "-k"]);
                command.arg(&socket).arg(lab.path("base.img"));
                command
            }
            Protocol::Http | Protocol::Opaque => {
                fs::create_dir_all(lab.path("tmp")).unwrap();
                let config = NGINX.replace("DIR", &lab.dir().display().to_string());
                fs::write(lab.path("nginx.conf"), config).unwrap();
                let mut command = lab.command("nginx");
                command.arg("-c").arg(lab.path("nginx.conf"));
                command
            }
        };
        let running = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        wait_until("the server listens", || UnixStream::connect(&socket).is_ok());
        Running(running)
    }

    fn kill(&mut self) {
        self.running.0.kill().unwrap();
        self.running.0.wait().unwrap();
    }

    fn restart(&mut self) {
        self.running = Self::run(self.lab, self.protocol);
    }

    /// How far a connection gets at the least, in bytes. An NBD server's image is recognized by 384 KiB of samples
    /// on each connection, without which that is of no use; over HTTP every answer names the version.
    fn useful(&self) -> u64 {
        if self.protocol == Protocol::Nbd { 450_000 } else { 130_000 }
    }

    /// The longest time in milliseconds between two troubles. Over HTTP a request that failed waits for a while
    /// before it is sent again, twice as long each time.
    fn calm(&self) -> u64 {
        if self.protocol == Protocol::Nbd { 120 } else { 500 }
    }
}

const NGINX: &str = r"
daemon off; master_process off; user root; pid DIR/nginx.pid; error_log DIR/error.log;
events { worker_connections 256; }
http {
  client_body_temp_path DIR/tmp; proxy_temp_path DIR/tmp; fastcgi_temp_path DIR/tmp;
  uwsgi_temp_path DIR/tmp; scgi_temp_path DIR/tmp; access_log off;
  server { listen unix:DIR/server.sock; location / { root DIR; } }
}
";

/// The address of the image behind the wire.
fn address(proxy: &Proxy) -> String {
    match &proxy.endpoint {
        Endpoint::Unix(path) => format!("nbd+unix:///?socket={}", path.display()),
        Endpoint::Tcp(address) => format!("http://{address}/base.img"),
    }
}

/// Breaks the wire in all ways until `is_over`, and leaves it whole. No outage lasts a second.
fn make_trouble(proxy: &Proxy, server: &mut Server<'_>, dice: &mut Dice, is_over: &AtomicBool) {
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
                server.kill();
                pause(dice, 100);
                server.restart();
            }
            _ => {}
        }
        let least = server.useful();
        control.cut_after.store(least + dice.below(2 * least), Ordering::SeqCst);
        pause(dice, server.calm());
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

/// Runs the operations over an image behind `protocol`.
fn run(protocol: Protocol) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let seed = number("COWSLIP_SEED").unwrap_or(now.as_micros() as u64);
    let steps = number("COWSLIP_STEPS").unwrap_or(MOUNTS * STEPS);
    eprintln!("COWSLIP_SEED={seed}");
    let mut lab = Lab::new();
    put(&lab.path("base.img"), &noise(SIZE, 5));
    let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&lab.open("base.img"), punch, 3 * MIB + 4096..5 * MIB).unwrap();
    lab.watch("base.img");
    let socket = lab.path("server.sock");
    let mut server = Server::start(&lab, protocol);
    let proxy = match protocol {
        Protocol::Nbd => Proxy::unix(&socket, protocol),
        Protocol::Http | Protocol::Opaque => Proxy::tcp(Endpoint::Unix(socket), protocol),
    };
    let proxy = proxy.unwrap();
    let source = address(&proxy);
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
                scope.spawn(|| make_trouble(&proxy, &mut server, &mut trouble, &is_over));
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

#[test]
fn a_wire_to_an_nbd_server_that_breaks_all_the_time_costs_no_byte() {
    run(Protocol::Nbd);
}

#[test]
fn a_wire_to_a_web_server_that_breaks_all_the_time_costs_no_byte() {
    run(Protocol::Http);
}
