//! Why an image cannot be read through QEMU; and what the program's last words mean.

use std::path::{Path, PathBuf};

use crate::base::advice::convert_command;
use crate::config::Format;
use crate::printable;
use crate::remote::IMAGE_PATH;

/// The reason why an image cannot be read; one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum ForeignError {
    /// The program is not installed.
    #[error(
        "'{}': {format} images are read through qemu-nbd, which is not found in a directory that no other user can write: install qemu-utils, or convert the image with {}",
        path.display(), convert_command(path, *format)
    )]
    NoProgram {
        /// The path of the image.
        path: PathBuf,
        /// Its format.
        format: Format,
    },
    /// The program cannot be locked in.
    #[error(
        "'{}': {format} images are read by a program that has to be locked in, and {why}: convert the image with {}",
        path.display(), convert_command(path, *format)
    )]
    Sandbox {
        /// The path of the image.
        path: PathBuf,
        /// Its format.
        format: Format,
        /// What the host lacks.
        why: String,
    },
    /// The image names a file that it may not have.
    #[error(
        "'{}' needs '{}', and what an image names is read only below --allow-backing: add --allow-backing '{}', if you know what is there",
        path.display(), printable::line(needed), printable::line(dir)
    )]
    Needs {
        /// The path of the image.
        path: PathBuf,
        /// The file.
        needed: String,
        /// Its directory.
        dir: String,
    },
    /// QEMU refuses the image.
    #[error("'{}' cannot be read as a {format} image: {why}", path.display())]
    Unreadable {
        /// The path of the image.
        path: PathBuf,
        /// The format.
        format: Format,
        /// The program's last words.
        why: String,
    },
    /// The image is on a server.
    #[error(
        "'{}': {format} images are not read from a server: let qemu-nbd -r -f {format} be the server, which reads it (or add ,format=raw for the bytes)",
        path.display()
    )]
    OnServer {
        /// The address.
        path: PathBuf,
        /// The format.
        format: Format,
    },
}

/// Returns what `text`, the end of a program that was to open the image at `path`, means. Names in
/// images may lead below `allowed`.
pub(super) fn explain(
    path: &Path,
    format: Format,
    text: &str,
    allowed: &[PathBuf],
) -> ForeignError {
    let dir = path.parent().unwrap_or(Path::new("/"));
    let said = last_words(text);
    if let Some((name, why)) = unopened(said) {
        let needed = follow(dir, name);
        let is_image = name == IMAGE_PATH || needed == path;
        if !is_image && !allowed.iter().any(|dir| needed.starts_with(dir)) {
            let dir = needed.parent().unwrap_or(Path::new("/")).display().to_string();
            let (path, needed) = (path.to_owned(), needed.display().to_string());
            return ForeignError::Needs { path, needed, dir };
        }
        let why = match is_image {
            true => why.to_owned(),
            false => format!("it needs '{}': {why}", needed.display()),
        };
        return ForeignError::Unreadable { path: path.to_owned(), format, why };
    }
    ForeignError::Unreadable { path: path.to_owned(), format, why: said.to_owned() }
}

/// Returns what QEMU says of the image, without what is said of every image.
fn last_words(text: &str) -> &str {
    let said = text.split_once("qemu-nbd: ").map_or(text, |(_, said)| said);
    let without_options = said
        .strip_prefix("Failed to blk_new_open 'driver=")
        .and_then(|rest| rest.split_once("': "))
        .map(|(_, rest)| rest);
    without_options.unwrap_or(said)
}

/// Returns the last file that could not be opened, and why.
fn unopened(said: &str) -> Option<(&str, &str)> {
    let (_, rest) = said.rsplit_once("Could not open '")?;
    rest.rsplit_once("': ")
}

/// Returns the path to which `name` leads from an image in `dir`.
fn follow(dir: &Path, name: &str) -> PathBuf {
    // QEMU looks beside the name by which it was given the image.
    let beside = IMAGE_PATH.trim_end_matches(|digit: char| digit.is_ascii_digit());
    let name = name.strip_prefix(beside).unwrap_or(name);
    dir.join(name.strip_prefix("./").unwrap_or(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(text: &str, allowed: &[PathBuf]) -> String {
        explain(Path::new("/srv/vm.vmdk"), Format::Vmdk, text, allowed).to_string()
    }

    /// The end of a program that says `what`.
    fn ended(name: &str, what: &str) -> String {
        format!(
            "'qemu-nbd' exited with status 1: qemu-nbd: Failed to blk_new_open \
             'driver=vmdk,file.driver=file,file.locking=auto,file.filename={name}': {what}"
        )
    }

    #[test]
    fn a_file_that_an_image_names_is_told_with_the_option_that_allows_it() {
        let beside = "Could not open '/proc/self/fd/vm-flat.vmdk': No such file or directory";
        let want = "'/srv/vm.vmdk' needs '/srv/vm-flat.vmdk', and what an image names is read only \
                    below --allow-backing: add --allow-backing '/srv', if you know what is there";
        assert_eq!(line(&ended(IMAGE_PATH, beside), &[]), want);
        let backing =
            "Could not open backing file: Could not open '/etc/shadow': Permission denied";
        for allowed in [&[][..], &["/srv".into()]] {
            let said = line(&ended("./vm.vmdk", backing), allowed);
            assert!(said.contains("needs '/etc/shadow'") && said.contains("'/etc'"), "{said}");
        }
        let gone = "Could not open './sub/x.vmdk': No such file or directory";
        assert_eq!(
            line(&ended("./vm.vmdk", gone), &["/srv".into()]),
            "'/srv/vm.vmdk' cannot be read as a vmdk image: it needs '/srv/sub/x.vmdk': No such file \
             or directory"
        );
    }

    #[test]
    fn what_is_wrong_with_the_image_is_told_without_the_programs_own_words() {
        for (name, what, why) in [
            (IMAGE_PATH, "Could not open '/proc/self/fd/4': Invalid argument", "Invalid argument"),
            ("./vm.vmdk", "Could not open './vm.vmdk': Invalid argument", "Invalid argument"),
            (IMAGE_PATH, "invalid VMDK image descriptor", "invalid VMDK image descriptor"),
        ] {
            let want = format!("'/srv/vm.vmdk' cannot be read as a vmdk image: {why}");
            assert_eq!(line(&ended(name, what), &[]), want);
        }
        let killed = "'qemu-nbd' was killed by signal 11";
        assert!(line(killed, &[]).ends_with(killed));
    }
}
