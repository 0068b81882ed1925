//! Sinks on block devices: loop devices over files, so that discarded ranges can be checked.

use std::fs;
use std::io::{IoSlice, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;

use crate::common::mount::{COWSLIP, Lab, one_line};
use cowslip::config::{
    DEFAULT_WINDOW, FinishWhen, Flow, Overwrite, Pad, SinkSpec, SpillCompression, StreamFrames,
    StreamSpec,
};
use cowslip::program::stop::Stop;
use cowslip::stream::context::{StdioMode, StreamContext};
use cowslip::stream::output::Sink;
use cowslip::stream::sink::{HostSink, StreamOpenError};

const MIB: u64 = 1 << 20;

fn open(device: &str, size: u64, frames: StreamFrames) -> Result<Box<HostSink>, StreamOpenError> {
    let target = SinkSpec::File { path: device.into(), overwrite: Overwrite::No };
    let spec = StreamSpec {
        size,
        dir: "/".into(),
        flow: Flow::Out(target.clone()),
        window: DEFAULT_WINDOW,
        read_window: 0,
        spill: None,
        compress: SpillCompression::Off,
        finish: FinishWhen::Explicit,
        pad: Pad::Size,
        frames,
    };
    let mountpoint = Path::new("/nonexistent/mount");
    let place = StreamContext { mountpoint, mount_dev: None, stdio: StdioMode::Unavailable };
    HostSink::open(&spec, &target, &place, Stop::new().unwrap()).map(Box::new)
}

#[test]
fn gaps_of_a_stream_are_discarded_on_a_device_and_read_as_zeros() {
    let lab = Lab::new();
    let old = vec![0xee; 16 * MIB as usize];
    fs::write(lab.path("dev"), &old).unwrap();
    let device = lab.loop_device("dev", "");
    let mut sink = open(&device, 16 * MIB, StreamFrames::Raw).unwrap();
    sink.send_data(0, &[IoSlice::new(&[1; 1000])]).unwrap();
    // Both ends of the hole are inside a sector.
    sink.send_hole(1000..8 * MIB + 77).unwrap();
    sink.send_zeros(8 * MIB + 77..9 * MIB).unwrap();
    assert_eq!((sink.monitor().kind(), sink.monitor().accepted()), ("device", 9 * MIB));
    sink.finish(16 * MIB).unwrap();
    let mut expected = vec![0; 16 * MIB as usize];
    expected[..1000].fill(1);
    assert!(fs::read(&device).unwrap() == expected);
    assert!(fs::read(lab.path("dev")).unwrap() == expected);
    let allocated = fs::metadata(lab.path("dev")).unwrap().blocks() * 512;
    assert!(allocated < 4 * MIB, "{allocated} bytes are still allocated");
}

#[test]
fn device_that_is_too_small_or_in_use_and_records_on_a_device_are_rejected() {
    let lab = Lab::new();
    fs::write(lab.path("dev"), vec![0xee; MIB as usize]).unwrap();
    let device = lab.loop_device("dev", "");
    let refused = |size, frames| open(&device, size, frames).unwrap_err().to_string();
    let small = refused(MIB + 512, StreamFrames::Raw);
    assert!(small.contains("has 1048576 bytes, and the stream 1049088"), "{small}");
    let records = refused(MIB, StreamFrames::Rbd);
    assert!(records.contains("is a block device: records need a file"), "{records}");
    let first = open(&device, MIB, StreamFrames::Raw).unwrap();
    let busy = refused(MIB, StreamFrames::Raw);
    assert!(busy.ends_with("Device or resource busy"), "{busy}");
    first.abort();
    assert!(fs::read(&device).unwrap() == vec![0xee; MIB as usize]);
}

#[test]
fn device_that_is_the_base_of_a_disk_is_not_written_and_the_reverse() {
    let lab = Lab::new();
    lab.file_with_holes("dev", 8 * MIB);
    let old = fs::read(lab.path("dev")).unwrap();
    let device = lab.loop_device("dev", "");
    lab.sh("mkdir n; head -c 8M /dev/zero | tr '\\0' n > new");
    let to_device = format!("o=stream:8M,to=file:{device}");
    let recv = |input: Stdio| {
        let mut command = lab.command(COWSLIP);
        command.args(["recv", "--frames", "raw", "--overwrite", &device]).stdin(input);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let recv_new = || recv(lab.open_ro("new").into()).wait_with_output().unwrap();
    for keys in ["overlay=ov", "mode=ro,lock=off"] {
        lab.mount(&format!("d={device},{keys}"));
        let mount = lab.refused(1, &format!("mount n {to_device}"));
        let recv = one_line(1, &recv_new(), "recv to a base");
        for line in [mount, recv] {
            assert!(line.contains(&format!("'{device}' cannot be written while")), "{line}");
        }
        let picture = lab.refused(1, &format!("map m/d --svg {device}"));
        assert!(picture.ends_with("it is a block device: name a file"), "{picture}");
        lab.sh("cmp m/d dev");
        assert!(fs::read(&device).unwrap() == old, "a refused one has written");
        lab.umount();
    }
    let line = lab.refused(1, &format!("mount n d={device},mode=ro {to_device}"));
    assert!(line.contains(&format!("'{device}'")), "{line}");
    assert!(fs::read(&device).unwrap() == old, "a refused one has written");

    lab.ok(&format!("mount n {to_device}"));
    for keys in ["overlay=ov", "mode=ro,lock=off"] {
        let line = lab.refused(1, &format!("mount m d={device},{keys}"));
        assert!(line.contains("is being written by another cowslip"), "{line}");
    }
    lab.sh("cp new n/o");
    lab.ok("finish n/o");
    // Whole, and so released, although its mount is still there.
    lab.mount(&format!("d={device},mode=ro"));
    lab.sh("cmp m/d new");
    lab.umount();
    lab.ok("umount n");

    let mut receiver = recv(Stdio::piped());
    let mut input = receiver.stdin.take().unwrap();
    input.write_all(&vec![b'x'; 4 * MIB as usize]).unwrap();
    // It has read more than a pipe holds, and so has opened the device.
    let line = lab.refused(1, &format!("mount m d={device},mode=ro"));
    assert!(line.contains("is being written by another cowslip"), "{line}");
    drop(input);
    assert!(receiver.wait().unwrap().success());
    lab.mount(&format!("d={device},mode=ro"));
    assert_eq!(lab.sh("head -c 4M m/d | tr -d x | wc -c").trim(), "0");
}
