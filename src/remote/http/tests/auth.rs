//! Header lines from files and commands.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::origin::Origin;
use super::*;

/// Writes a file that only we can read.
pub(super) fn secret(room: &Path, text: &str) -> PathBuf {
    let file = room.join("auth");
    fs::write(&file, text).unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    file
}

fn command(line: &str) -> Option<AuthSource> {
    let words = ["sh", "-c", line].map(Into::into);
    Some(AuthSource::Command(words.to_vec()))
}

/// A server that wants a token.
fn guarded(wanted: impl Fn(usize) -> String + Send + Sync + 'static) -> Origin {
    let bytes = image(MIB);
    Origin::writing(move |request| {
        let wanted = format!("Bearer {}", wanted(request.number));
        match request.header("authorization") == Some(wanted.as_str()) {
            true => request.part(&bytes, "ETag: \"v1\"\r\n"),
            false => b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n".to_vec(),
        }
    })
}

#[test]
fn a_command_is_run_again_when_its_token_is_refused() {
    let room = tempfile::tempdir().unwrap();
    // The token changes with every run.
    let line = "echo x >>runs; echo \"Authorization: Bearer $(wc -l <runs)\"";
    let options = HttpOptions { auth: command(line), dir: room.path().into(), ..options() };
    let origin = guarded(|number| if number < 2 { "1".to_owned() } else { "2".to_owned() });
    let client = open_with(&origin, &options);
    read(&client, 0..9).unwrap();
    std::thread::sleep(Duration::from_millis(1050));
    let asked: Vec<_> = (0..8).map(|_| answer_of(|done| client.read(0..9, done))).collect();
    asked.into_iter().for_each(|answer| assert_eq!(answer.wait().unwrap(), image(MIB)[..9]));
    assert_eq!(fs::read_to_string(room.path().join("runs")).unwrap(), "x\nx\n");
    assert!(client.outage().is_none());
}

#[test]
fn a_file_is_read_again_when_its_token_is_refused() {
    let room = tempfile::tempdir().unwrap();
    let file = secret(room.path(), "# a comment\n\nAuthorization: Bearer old\r\n");
    let options = HttpOptions { auth: Some(AuthSource::File(file)), ..options() };
    let origin = guarded(|number| if number < 1 { "old".to_owned() } else { "new".to_owned() });
    let client = open_with(&origin, &options);
    secret(room.path(), "Authorization: Bearer new");
    std::thread::sleep(Duration::from_millis(1050));
    read(&client, 0..9).unwrap();
    let line = why(&guarded(|_| "other".to_owned()), &options);
    assert_eq!(
        line,
        "the server answered '401 Unauthorized': the header lines of auth= are not enough"
    );
}

#[test]
fn a_file_that_another_user_turned_elsewhere_is_not_read_again() {
    let room = tempfile::tempdir().unwrap();
    let (file, other) =
        (secret(room.path(), "Authorization: Bearer old"), room.path().join("other"));
    let options = HttpOptions {
        auth: Some(AuthSource::File(file.clone())),
        io_timeout: Duration::from_secs(2),
        ..options()
    };
    let origin = guarded(|number| if number < 1 { "old".to_owned() } else { "s3cret".to_owned() });
    let client = open_with(&origin, &options);
    secret(room.path(), "Authorization: Bearer s3cret");
    fs::rename(&file, &other).unwrap();
    std::os::unix::fs::symlink(&other, &file).unwrap();
    std::os::unix::fs::lchown(&file, Some(12_345), None).unwrap();
    std::thread::sleep(Duration::from_millis(1050));
    read(&client, 0..9).unwrap_err();
    let line = why(&origin, &options);
    assert!(line.contains("the link '") && line.contains("uid 12345"), "{line}");
}

#[test]
fn what_gives_no_header_lines_is_refused_without_showing_it() {
    let room = tempfile::tempdir().unwrap();
    let origin = guarded(|_| "x".to_owned());
    let options = HttpOptions { io_timeout: Duration::from_secs(1), ..options() };
    let refused = |auth: Option<AuthSource>| {
        let begun = Instant::now();
        let line = why(&origin, &HttpOptions { auth, dir: room.path().into(), ..options.clone() });
        assert!(begun.elapsed() < Duration::from_secs(3), "{line}: {:?}", begun.elapsed());
        line
    };
    for (text, hint) in [
        ("s3cret", "line 1: write 'Name: value'"),
        ("A: b\ns3cret\0: x", "line 2: no header has such a name"),
        ("X: s3\0cret", "line 1: no header has such a value"),
        ("\nHost: s3cret", "line 2: the header 'host' is cowslip's own"),
        ("range: bytes=0-1", "the header 'range' is cowslip's own"),
        ("# nothing", "there is no header line"),
        (&"X: y\n".repeat(40), "more than 32 header lines"),
        (&"X: y\n".repeat(20_000), "File too large"),
        ("", "is empty, or no file"),
    ] {
        let line = refused(Some(AuthSource::File(secret(room.path(), text))));
        assert!(line.contains(hint) && line.starts_with("auth='"), "{hint}: {line}");
    }
    let open = secret(room.path(), "Authorization: s3cret");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(refused(Some(AuthSource::File(open.clone()))).contains("chmod 600"));
    fs::set_permissions(&open, fs::Permissions::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&open, Some(12_345), None).unwrap();
    assert!(refused(Some(AuthSource::File(open))).contains("belongs to somebody else"));
    let pipe = room.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    for path in [pipe, room.path().into(), "/nowhere/auth".into(), "/dev/zero".into()] {
        refused(Some(AuthSource::File(path)));
    }
    for (line, hint) in [
        ("exit 3", "ended with exit status: 3"),
        ("echo no such user >&2; false", "no such user"),
        ("yes 'A: b'", "printed more than 64 KiB"),
        ("sleep 9", "did not end within 1 s"),
        ("sleep 9 & exec >&-; sleep 9", "did not end within 1 s"),
        ("true", "there is no header line"),
    ] {
        let line = refused(command(line));
        assert!(line.contains(hint) && line.starts_with("auth=cmd:sh: "), "{hint}: {line}");
    }
    let nowhere = AuthSource::Command(vec!["/nowhere/token".into()]);
    assert!(refused(Some(nowhere)).contains("cannot run it: No such file"));
    assert_eq!(origin.count(), 0);
}
