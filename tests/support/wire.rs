//! The wire between a client and a server as a program, for benchmarks.
//!
//! ```text
//!   wire PROTOCOL HOST:PORT|SOCKET      PROTOCOL: nbd, http, opaque
//! ```
//!
//! It prints the address at which it listens, then answers each line that it reads with one line,
//! until the lines end:
//!
//! ```text
//!   link RTT_US RATE     the round trip in microseconds, bytes a second (0: no limit)
//!   cut N   flip N       as the fields of `Control`: after N bytes of the server, its N-th byte
//!   stall N   refuse 0|1
//!   drop                 ends all connections
//!   counts               since the start: {"connections":1,"requests":9,"turns":3,"up":500,"down":70000}
//! ```

#[path = "mod.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod support;

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::atomic::Ordering;
use std::time::Duration;

use support::{Endpoint, Protocol, Proxy};

/// Does what a line says, and returns the answer.
fn answer(proxy: &Proxy, line: &str) -> Option<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let control = &proxy.control;
    let numbers: Option<Vec<u64>> = words.iter().skip(1).map(|word| word.parse().ok()).collect();
    match (*words.first()?, &numbers?[..]) {
        ("link", &[rtt, rate]) => control.set_link(Duration::from_micros(rtt), rate),
        ("cut", &[bytes]) => control.cut_after.store(bytes, Ordering::SeqCst),
        ("flip", &[byte]) => control.flip_at.store(byte, Ordering::SeqCst),
        ("stall", &[below]) => {
            control.stalled_below.store(usize::try_from(below).ok()?, Ordering::SeqCst);
        }
        ("refuse", &[on]) => control.refuses.store(on != 0, Ordering::SeqCst),
        ("drop", []) => control.cut_all(),
        ("counts", []) => {
            let [requests, turns, up, down] =
                [&control.requests, &control.turns, &control.up, &control.down]
                    .map(|count| count.load(Ordering::SeqCst));
            let connections = control.connections.load(Ordering::SeqCst);
            return Some(format!(
                "{{\"connections\":{connections},\"requests\":{requests},\"turns\":{turns},\"up\":{up},\"down\":{down}}}"
            ));
        }
        _ => return None,
    }
    Some("ok".into())
}

fn run() -> Result<(), String> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [protocol, server] = &words[..] else {
        return Err("usage: wire nbd|http|opaque HOST:PORT|SOCKET".into());
    };
    let protocol = match protocol.as_str() {
        "nbd" => Protocol::Nbd,
        "http" => Protocol::Http,
        "opaque" => Protocol::Opaque,
        other => return Err(format!("'{other}' is no protocol: nbd, http or opaque")),
    };
    let server = match server.parse() {
        Ok(address) => Endpoint::Tcp(address),
        Err(_) => Endpoint::Unix(PathBuf::from(server)),
    };
    let proxy = Proxy::tcp(server, protocol).map_err(|error| format!("cannot listen: {error}"))?;
    let Endpoint::Tcp(address) = &proxy.endpoint else { return Err("no address".into()) };
    let told = |text: &str| {
        let mut out = io::stdout().lock();
        writeln!(out, "{text}").and_then(|()| out.flush()).map_err(|error| error.to_string())
    };
    told(&address.to_string())?;
    for line in io::stdin().lines() {
        let line = line.map_err(|error| error.to_string())?;
        told(&answer(&proxy, &line).unwrap_or_else(|| format!("not understood: {line}")))?;
    }
    Ok(())
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("wire: {error}");
            ExitCode::FAILURE
        }
    }
}
