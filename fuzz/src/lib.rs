//! Helpers of the fuzz targets: a memory limit, a directory for files, a file in memory.
//!
//! A target runs one parser and checks its result. A finding is a panic, a run longer than
//! libFuzzer's `-timeout`, more memory than [`LIMIT`], or a result that breaks the documented
//! promise, which the targets assert.

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use cowslip::extents::ExtentKind;
use cowslip::layer::{Layer, Wait};
use cowslip::overlay::host_file::{Create, HostFile};
use cowslip::overlay::storage::Storage;
use cowslip::overlay::record_log::{LogDir, ReplacedLog};
use parking_lot::Mutex;
use tempfile::TempDir;

/// Heap limit in bytes for the whole process: 64 MiB, the same as for a hostile image.
pub const LIMIT: usize = 64 << 20;

/// An allocator that panics when more than [`LIMIT`] bytes are allocated. Sanitizers have such a
/// limit too; this one works without them, and counts only allocations of Rust code.
struct Limited;

static TAKEN: AtomicUsize = AtomicUsize::new(0);

fn take(bytes: usize) {
    if TAKEN.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > LIMIT {
        // Resets the counter, since the panic message needs memory.
        TAKEN.store(0, Ordering::Relaxed);
        panic!("more than 64 MiB of memory: {bytes} bytes were asked for last");
    }
}

// SAFETY: every call is passed to the system allocator unchanged.
unsafe impl GlobalAlloc for Limited {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller upholds the contract of this method.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: the caller upholds the contract of this method.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        TAKEN.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller upholds the contract of this method.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, new: usize) -> *mut u8 {
        take(new);
        TAKEN.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller upholds the contract of this method.
        unsafe { System.realloc(at, layout, new) }
    }
}

#[global_allocator]
static ALLOCATOR: Limited = Limited;

/// A directory in memory with one file, the input. The directory is removed on drop, or by the
/// program that started the process.
pub struct Lab {
    dir: TempDir,
    file: File,
    path: PathBuf,
}

impl Lab {
    /// Creates an empty file called `name` in a new directory.
    ///
    /// # Panics
    /// If the host has no space for it.
    #[must_use]
    pub fn new(name: &str) -> Self {
        let shm = Path::new("/dev/shm");
        let root = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let root = std::env::var_os("COWSLIP_FUZZ_DIR").map_or(root, PathBuf::from);
        let dir = tempfile::Builder::new().prefix("cowslip-fuzz-").tempdir_in(root).unwrap();
        let path = dir.path().join(name);
        let file = File::create(&path).unwrap();
        Self { dir, file, path }
    }

    /// Replaces the content of the file with `bytes` and returns its path.
    ///
    /// # Panics
    /// If the host has no space for them.
    pub fn put(&self, bytes: &[u8]) -> &Path {
        self.file.set_len(0).unwrap();
        self.file.write_all_at(bytes, 0).unwrap();
        &self.path
    }

    /// Returns the directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }
}

/// Maximum number of extents of a layer that [`walk`] examines, and maximum number of bytes it
/// reads.
const PIECES: usize = 4096;
const READ: u64 = 4 << 20;

/// Maps and reads `layer` up to these limits, and checks the documented promises.
///
/// # Panics
/// If a result breaks a promise of [`Layer`].
pub fn walk(layer: &dyn Layer) {
    let size = layer.size();
    let (mut at, mut read) = (0, 0);
    let mut buf = vec![0; 1 << 16];
    for _ in 0..PIECES {
        if at >= size {
            break;
        }
        let Ok(found) = layer.extent_at(at..size, Wait::Yes) else { break };
        assert!(found.range.start == at && found.range.end > at && found.range.end <= size);
        let end = found.range.end;
        if found.kind == ExtentKind::Data && read < READ {
            let len = usize::try_from(end - at).unwrap_or(usize::MAX).min(buf.len());
            match layer.read_at(&mut buf[..len], at, Wait::Yes) {
                Ok(found) => {
                    let end = found.range.end;
                    assert!(found.range.start == at && end > at && end <= at + len as u64);
                    read += end - at;
                    at = end;
                }
                // The next extent may be readable.
                Err(_) => at = end,
            }
        } else {
            at = end;
        }
    }
    // The end may be beyond the limits above.
    if let Some(last) = size.checked_sub(1) {
        let _ = layer.read_at(&mut [0], last, Wait::Yes);
    }
}

/// A file in memory.
#[derive(Default)]
pub struct Memory(Mutex<Vec<u8>>);

impl Memory {
    /// Creates a file that holds `bytes`.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self(Mutex::new(bytes)))
    }
}

impl Storage for Memory {
    fn read_at(&self, buf: &mut [u8], offset: u64, _: Wait) -> io::Result<()> {
        let bytes = self.0.lock();
        let from = usize::try_from(offset).unwrap_or(usize::MAX).min(bytes.len());
        let len = buf.len().min(bytes.len() - from);
        buf[..len].copy_from_slice(&bytes[from..from + len]);
        buf[len..].fill(0);
        Ok(())
    }

    fn write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut bytes = self.0.lock();
        let mut at = usize::try_from(offset).map_err(io::Error::other)?;
        for part in parts {
            let end = at + part.len();
            if bytes.len() < end {
                bytes.resize(end, 0);
            }
            bytes[at..end].copy_from_slice(part);
            at = end;
        }
        Ok(())
    }

    fn punch_hole(&self, _: Range<u64>) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, range: Range<u64>) -> io::Result<()> {
        let mut bytes = self.0.lock();
        let end = usize::try_from(range.end).map_err(io::Error::other)?.max(bytes.len());
        bytes.resize(end, 0);
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let len = usize::try_from(len).map_err(io::Error::other)?;
        self.0.lock().truncate(len);
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.0.lock().len() as u64)
    }

    fn next_allocated(&self, range: Range<u64>) -> Option<u64> {
        let end = range.end.min(self.0.lock().len() as u64);
        (range.start < end).then_some(range.start)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn drop_cache(&self) {}

    fn host_fd(&self, _: Range<u64>) -> Option<BorrowedFd<'_>> {
        None
    }

    fn host_file(&self) -> Option<&HostFile> {
        None
    }
}

/// The directory of the log of a layer in memory; it keeps the newest replacement.
#[derive(Default)]
pub struct MemoryLogDir(pub Mutex<Option<Arc<Memory>>>);

impl LogDir for MemoryLogDir {
    fn replace_log(
        &self,
        fill: &mut dyn FnMut(&dyn Storage) -> io::Result<()>,
    ) -> io::Result<ReplacedLog> {
        let file = Arc::new(Memory::default());
        fill(&*file)?;
        *self.0.lock() = Some(Arc::clone(&file));
        Ok(ReplacedLog { file, dir_synced: Ok(()) })
    }

    fn journal(&self, _: Create) -> io::Result<Option<Arc<dyn Storage>>> {
        Ok(None)
    }
}
