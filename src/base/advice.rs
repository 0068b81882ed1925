//! What messages about images advise: commands to be pasted into a shell.

use std::path::Path;

use crate::config::Format;

/// Returns what to do with changes over a base in `format`, which is only read.
#[must_use]
pub fn way_of_changes(format: Format) -> &'static str {
    match format {
        // QEMU reads them, too, and no more.
        Format::Dmg => "copy the disk out",
        _ => "cowslip diff FILE -o new.qcow2, then qemu-img commit new.qcow2",
    }
}

/// Returns the command that shows the image at `path`, in a forensic format, as a raw one.
pub(super) fn reader_of(path: &Path, format: Format) -> String {
    let program = if format == Format::Aff { "affuse" } else { "ewfmount" };
    format!("{program} {} DIR", shell_quote(path))
}

/// Returns the command that makes a raw image of `path`, to be pasted into a shell.
pub(super) fn convert_command(path: &Path, format: Format) -> String {
    let suffix = if path.extension().is_some_and(|suffix| suffix == "img") { "raw" } else { "img" };
    let output = path.with_extension(suffix);
    let (input, output) = (shell_quote(path), shell_quote(&output));
    format!("qemu-img convert -f {format} -O raw {input} {output}")
}

/// Quotes `path` as one word of a POSIX shell.
fn shell_quote(path: &Path) -> String {
    let text = path.to_string_lossy();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:,@%=".contains(c);
    if text.chars().all(is_plain) {
        return text.into_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
