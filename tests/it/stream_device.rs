//! Sinks on block devices: loop devices over files, so that discarded ranges can be checked.

use std::fs;
use std::io::IoSlice;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::common::mount::Lab;
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
