//! The operations and the model of the library's tests, applied to a real mount.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use crate::common::model::{End, Menu, Model, Op, Target, op, run};
use crate::common::mount::*;
use cowslip::extents::{Extent, ExtentKind};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;

/// Two disks of a mount, with the arguments that mount them again.
struct Mounted {
    /// Closed before the lab ends.
    files: Vec<File>,
    lab: Lab,
    words: String,
}

impl Mounted {
    fn new(lab: Lab, words: &str) -> Self {
        lab.mount(words);
        let mut mounted = Self { files: Vec::new(), lab, words: words.to_owned() };
        mounted.open();
        mounted
    }

    fn open(&mut self) {
        self.files = vec![self.lab.open("m/d"), self.lab.open("m/e")];
    }
}

impl Target for Mounted {
    fn size(&mut self, disk: usize) -> io::Result<u64> {
        Ok(self.files[disk].metadata()?.len())
    }

    fn read_at(&mut self, disk: usize, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.files[disk].read_exact_at(buf, offset)
    }

    fn write_at(&mut self, disk: usize, buf: &[u8], offset: u64) -> io::Result<()> {
        self.files[disk].write_all_at(buf, offset)
    }

    fn zero(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        fallocate(&self.files[disk], ZERO_KEEP, range)
    }

    fn punch(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        fallocate(&self.files[disk], PUNCH, range)
    }

    fn truncate(&mut self, disk: usize, size: u64) -> io::Result<()> {
        self.files[disk].set_len(size)
    }

    fn allocate(&mut self, disk: usize, range: Range<u64>) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        fallocate(&self.files[disk], rustix::fs::FallocateFlags::empty(), range)
    }

    fn copy(&mut self, from: (usize, Range<u64>), to: (usize, u64)) -> io::Result<()> {
        let len = from.1.end - from.1.start;
        let (source, target) = (&self.files[from.0], &self.files[to.0]);
        assert_eq!(copy_range(source, from.1.start, target, to.1, len)?, len);
        Ok(())
    }

    fn sync(&mut self, disk: usize) -> io::Result<()> {
        self.files[disk].sync_all()
    }

    fn extents(&mut self, disk: usize) -> io::Result<Vec<Extent>> {
        let size = self.size(disk)?;
        let (mut all, mut at) = (Vec::new(), 0);
        for run in data_runs(&self.files[disk]) {
            if at < run.start {
                all.push(Extent { range: at..run.start, kind: ExtentKind::Hole });
            }
            at = run.end;
            all.push(Extent { range: run, kind: ExtentKind::Data });
        }
        if at < size {
            all.push(Extent { range: at..size, kind: ExtentKind::Hole });
        }
        Ok(all)
    }

    fn restart(&mut self, end: End) -> io::Result<()> {
        match end {
            End::Clean => {
                self.files.clear();
                self.lab.umount();
            }
            End::Kill | End::PowerCut(_) => {
                self.lab.kill();
                self.files.clear();
            }
        }
        self.lab.mount(&self.words);
        self.open();
        Ok(())
    }
}

const BASE: u64 = 300_000;

/// Runs `ops` on a disk over a base and on a blank one. After each operation the disks are also
/// read through the kernel's cache.
fn check(ops: &[Op], menu: Menu, options: &str) {
    let mut lab = Lab::new();
    lab.base("base.img", BASE);
    let base = read(&lab.open_ro("base.img"), 0, BASE);
    let block = menu.block;
    let words = format!(
        "d=base.img,overlay=ov,block={block} e=blank:100000,overlay=ow,block={block} {options}"
    );
    let mut mounted = Mounted::new(lab, &words);
    let mut models = [Model::new(base), Model::new(vec![0; 100_000])];
    // A kill loses no completed write, and the power cannot be cut here.
    let ops: Vec<Op> = ops
        .iter()
        .map(|op| match op {
            Op::Restart { end: End::PowerCut(_) } => Op::Restart { end: End::Kill },
            other => other.clone(),
        })
        .collect();
    let path = mounted.lab.path("m");
    run(&mut mounted, &mut models, menu, &ops, |target, op, models| {
        if matches!(op, Op::Read { .. } | Op::Sync { .. }) {
            return;
        }
        for (disk, name) in ["d", "e"].into_iter().enumerate() {
            models[disk].check_extents(&target.extents(disk).unwrap()).unwrap();
            let reader = File::open(path.join(name)).unwrap();
            let found = read(&reader, 0, models[disk].size());
            models[disk].check_same(&found).unwrap();
        }
    });
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        max_shrink_iters: 60,
        failure_persistence: Some(Box::new(FileFailurePersistence::WithSource("regressions"))),
        ..ProptestConfig::default()
    }
}

const SMALL: Menu = Menu { block: 4096, most: 400_000, resize: true, crash: true };
const LARGE: Menu = Menu { block: 65536, most: 400_000, resize: true, crash: true };

proptest! {
    #![proptest_config(config(24))]

    #[test]
    fn mount_matches_the_model(ops in prop::collection::vec(op(SMALL), 1..60)) {
        check(&ops, SMALL, "");
    }

    #[test]
    fn mount_with_large_blocks_matches_the_model(
        ops in prop::collection::vec(op(LARGE), 1..60),
    ) {
        check(&ops, LARGE, "");
    }

    #[test]
    fn mount_without_cache_matches_the_model(
        ops in prop::collection::vec(op(SMALL), 1..60),
    ) {
        check(&ops, SMALL, "--cache none");
    }
}

const CALM: Menu = Menu { block: 4096, most: 400_000, resize: true, crash: false };

proptest! {
    #![proptest_config(config(24))]

    // Without kills: with writeback a killed daemon loses the pages that the kernel has not written
    // yet.
    #[test]
    fn mount_with_writeback_matches_the_model(
        ops in prop::collection::vec(op(CALM), 1..60),
    ) {
        check(&ops, CALM, "--cache writeback");
    }
}
