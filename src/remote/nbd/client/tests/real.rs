//! Real servers: qemu-nbd, nbdkit, nbd-server.

use std::fs;
use std::net::TcpListener;

use super::super::*;
use crate::remote::nbd::codec::Headers;
use crate::remote::nbd::testing::*;
use crate::remote::transport::MAX_ZERO;

/// Compares all reads and extents of `client` with the image.
fn check_all(client: &NbdClient, image: &Image) {
    assert_eq!(client.size(), image.size());
    for step in [4096, 65_536, u64::from(client.limits().max_len)] {
        assert!(read_all(client, step) == image.bytes, "pieces of {step} bytes differ");
    }
    let extents = all_extents(client);
    for extent in &extents {
        if extent.kind != ExtentKind::Data {
            assert!(!image.has_data(&extent.range), "{extent:?} is no hole");
        }
    }
    let zeros = extents.iter().filter(|extent| extent.kind != ExtentKind::Data);
    let zeros: u64 = zeros.map(Extent::len).sum();
    assert_eq!(client.knows_extents(), zeros > 1 << 20, "{extents:?}");
}

#[test]
fn qemu_nbd_gives_the_files_bytes_and_holes() {
    let image = Image::new();
    let _server = image.qemu_nbd(&["--persistent", "-r", "--shared=4"]);
    for connections in [1, 4] {
        let client = open(&image.socket(), "vm", NbdOptions { connections, ..options() });
        assert!(client.knows_extents() && client.shared.export.flags.is_read_only());
        // Extended ones since QEMU 8.2.
        let headers = client.shared.export.headers;
        assert!(matches!(headers, Headers::Structured | Headers::Extended), "{headers:?}");
        check_all(&client, &image);
    }
}

#[test]
fn nbdkit_gives_the_files_bytes_and_holes_with_and_without_chunks() {
    let image = Image::new();
    for (arg, knows) in [("-r", true), ("--no-sr", false)] {
        let _server = image.nbdkit(&["-r", arg], &[]);
        let client = open(&image.socket(), "", NbdOptions { connections: 3, ..options() });
        assert_eq!(client.knows_extents(), knows);
        check_all(&client, &image);
    }
}

#[test]
fn nbd_server_gives_the_files_bytes() {
    let image = Image::new();
    let (_server, port) = image.nbd_server();
    let target = target(&format!("nbd://127.0.0.1:{port}/vm"));
    let client = NbdClient::open(&target, options()).unwrap();
    assert!(!client.knows_extents());
    assert_eq!(read_all(&client, 4096), image.bytes[..]);
}

#[test]
fn requests_are_cut_and_rounded_to_the_blocks_of_the_server() {
    let image = Image::with_len(1 << 20 | 5 << 16);
    let policy = [
        "blocksize-minimum=65536",
        "blocksize-preferred=65536",
        "blocksize-maximum=196608",
        "blocksize-error-policy=error",
    ];
    let _server = image.nbdkit(&["-r", "--filter=blocksize-policy"], &policy);
    let client = open(&image.socket(), "", options());
    let limits = client.limits();
    assert_eq!((limits.alignment, limits.max_len), (65_536, 196_608));
    assert_eq!(client.tail(), 0);
    assert!(read_all(&client, u64::from(limits.max_len)) == image.bytes);
    let some = extents(&client, 70_000..70_001).wait().unwrap();
    assert_eq!(some, [Extent::new(70_000..70_001, ExtentKind::Hole)]);
    assert_eq!(read(&client, 0..200_000).errno(), libc::EINVAL);
}

#[test]
fn requests_outside_the_image_are_refused_without_the_server() {
    let image = Image::new();
    let _server = image.nbdkit(&["-r"], &[]);
    let client = open(&image.socket(), "", options());
    let size = image.size();
    let empty = std::ops::Range { start: 5, end: 5 };
    for range in [empty, size - 1..size + 1, 0..(4 << 20) + 1] {
        assert_eq!(read(&client, range).errno(), libc::EINVAL);
    }
    assert_eq!(extents(&client, size..size + 1).errno(), libc::EINVAL);
    assert_eq!(write(&client, u64::MAX, b"x").errno(), libc::EINVAL);
}

#[test]
fn an_error_of_the_server_fails_its_request_alone() {
    let image = Image::new();
    let trigger = image.dir.path().join("fail");
    let when = format!("error-pread-file={}", trigger.display());
    let _server = image
        .nbdkit(&["-r", "--filter=error"], &["error-pread=ENOSPC", "error-pread-rate=100%", &when]);
    let client = open(&image.socket(), "", options());
    fs::write(&trigger, "").unwrap();
    assert_eq!(read(&client, 0..4096).errno(), libc::ENOSPC);
    assert!(extents(&client, 0..4096).wait().is_ok());
    fs::remove_file(&trigger).unwrap();
    assert_eq!(read(&client, 0..4096).wait().unwrap(), image.slice(0..4096));
}

#[test]
fn load_opens_connections_where_the_server_allows_it() {
    let image = Image::new();
    let _server = image.nbdkit(&["-r", "--filter=delay"], &["rdelay=20ms"]);
    let client = open(&image.socket(), "", NbdOptions { connections: 4, ..options() });
    assert_eq!(read(&client, 0..9).wait().unwrap(), image.slice(0..9));
    assert_eq!(client.connections(), 1);
    // Sixteen small ones are enough for one.
    let small: Vec<_> = (0..16).map(|at| read(&client, at * 4096..at * 4096 + 9)).collect();
    for (at, small) in (0..).zip(small) {
        assert_eq!(small.wait().unwrap(), image.slice(at * 4096..at * 4096 + 9));
    }
    assert_eq!(client.connections(), 1);
    eventually(|| {
        assert!(read_all(&client, 65_536) == image.bytes);
        client.connections() == 4
    });
}

#[test]
fn a_server_that_takes_one_client_is_enough() {
    let image = Image::new();
    // Flags allow several connections, but the second is never taken.
    let _server = image.nbdkit(&["-r", "--filter=limit"], &["limit=1"]);
    let client = open(&image.socket(), "", NbdOptions { connections: 4, ..options() });
    for _ in 0..3 {
        assert!(read_all(&client, 4096) == image.bytes);
    }
    assert_eq!((client.connections(), client.outage()), (1, None));
}

#[test]
fn writes_zeros_and_flushes_change_the_file() {
    let image = Image::new();
    for is_qemu in [true, false] {
        let _server = match is_qemu {
            true => image.qemu_nbd(&["--persistent"]),
            false => image.nbdkit(&[], &[]),
        };
        let name = if is_qemu { "vm" } else { "" };
        let client =
            open(&image.socket(), name, NbdOptions { access: Access::ReadWrite, ..options() });
        let writes: Vec<_> =
            (0..40_u8).map(|at| write(&client, u64::from(at) * 8192, &vec![at; 8192])).collect();
        writes.into_iter().for_each(|write| write.wait().unwrap());
        zero(&client, 8192..16_384, true).wait().unwrap();
        zero(&client, 1 << 20..(1 << 20) + 65_536, false).wait().unwrap();
        flush(&client).wait().unwrap();
        let found = fs::read(image.path()).unwrap();
        for at in 0..40_u8 {
            let start = usize::from(at) * 8192;
            let expected = if at == 1 { 0 } else { at };
            assert!(found[start..start + 8192].iter().all(|byte| *byte == expected), "{at}");
        }
        assert!(found[1 << 20..(1 << 20) + 65_536].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn zeros_are_written_up_to_the_most_of_a_request() {
    let image = Image::new();
    fs::File::options().write(true).open(image.path()).unwrap().set_len(5 << 30).unwrap();
    let _server = image.qemu_nbd(&["--persistent"]);
    let client = open(&image.socket(), "vm", NbdOptions { access: Access::ReadWrite, ..options() });
    let too_many = zero(&client, 4096..4097 + MAX_ZERO, true).wait().unwrap_err();
    assert_eq!(too_many.raw_os_error(), Some(libc::EINVAL));
    zero(&client, 4096..4096 + MAX_ZERO, true).wait().unwrap();
    let first = read(&client, 0..8192).wait().unwrap();
    assert_eq!(first[..4096], image.bytes[..4096]);
    assert!(first[4096..].iter().all(|byte| *byte == 0));
    assert!(read(&client, 2 << 20..(2 << 20) + 4096).wait().unwrap().iter().all(|byte| *byte == 0));
}

#[test]
fn a_read_only_export_cannot_be_opened_for_writing() {
    let image = Image::new();
    let _server = image.nbdkit(&["-r"], &[]);
    let options = NbdOptions { access: Access::ReadWrite, ..options() };
    let error = NbdClient::open(&unix_target(&image.socket(), ""), options).err().unwrap();
    assert!(error.to_string().ends_with("read-only: take mode=ro or an overlay"), "{error}");
}

#[test]
fn servers_that_cannot_be_used_are_told_in_one_line() {
    let image = Image::new();
    let _server = image.qemu_nbd(&["--persistent", "-r"]);
    let why = |text: &str| {
        let options = NbdOptions { open_timeout: Duration::ZERO, ..options() };
        let error = NbdClient::open(&target(text), options).err().unwrap().to_string();
        assert!(!error.contains('\n'));
        error
    };
    let socket = image.socket();
    let absent = why(&format!("nbd+unix:///other?socket={}", socket.display()));
    assert!(
        absent.contains("other?socket=")
            && absent.contains("the server has no export named 'other'"),
        "{absent}"
    );
    let nothing = why("nbd+unix:///?socket=/nowhere/socket");
    assert_eq!(
        nothing,
        "nbd+unix:///?socket=/nowhere/socket: cannot connect: No such file or directory"
    );
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let refused = why(&format!("nbd://127.0.0.1:{port}/vm"));
    assert_eq!(refused, format!("nbd://127.0.0.1:{port}/vm: cannot connect: Connection refused"));
    let unknown = why("nbd://no-such-host.invalid/vm");
    assert!(
        unknown.starts_with(
            "nbd://no-such-host.invalid/vm: cannot find the host 'no-such-host.invalid': "
        ),
        "{unknown}"
    );
    // It takes the connection and says nothing.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = silent.local_addr().unwrap().port();
    let hangs = why(&format!("nbd://127.0.0.1:{port}/vm"));
    assert!(hangs.contains("the server did not answer within 1 s"), "{hangs}");
}

#[test]
fn a_server_that_is_not_up_is_waited_for() {
    let image = Image::new();
    let target = unix_target(&image.socket(), "");
    let opening = thread::spawn(move || NbdClient::open(&target, options()).map(|_| ()));
    thread::sleep(Duration::from_millis(300));
    assert!(!opening.is_finished());
    let _server = image.nbdkit(&["-r"], &[]);
    opening.join().unwrap().unwrap();
}
