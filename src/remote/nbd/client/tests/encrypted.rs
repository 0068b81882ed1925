//! TLS, with nbdkit.

use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;

use super::super::*;
use crate::remote::nbd::testing::*;
use crate::remote::tls::TlsFiles;

/// An authority, and certificates of the server and the client that lead to it, as nbdkit wants them.
struct Certificates(tempfile::TempDir);

impl Certificates {
    fn new(server_days: &str) -> Self {
        let this = Self(tempfile::TempDir::new().unwrap());
        this.openssl("req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 9 -subj /CN=authority -keyout ca-key.pem -out ca-cert.pem");
        for (name, days) in [("server", server_days), ("client", "-days 9")] {
            std::fs::write(this.path(&format!("{name}.ext")), "subjectAltName=DNS:disk.test\n")
                .unwrap();
            this.openssl(&format!("req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN={name} -keyout {name}-key.pem -out {name}.csr"));
            this.openssl(&format!("x509 -req -in {name}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -extfile {name}.ext {days} -out {name}-cert.pem"));
        }
        this
    }

    fn sound() -> Self {
        Self::new("-days 9")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn openssl(&self, args: &str) {
        let out = Command::new("openssl").args(args.split(' ')).current_dir(&self.0).output();
        let out = out.expect("openssl is installed");
        assert!(out.status.success(), "{args}: {}", String::from_utf8_lossy(&out.stderr));
    }

    fn serve(&self, image: &Image, more: &[&str]) -> TestServer {
        let dir = format!("--tls-certificates={}", self.0.path().display());
        image.nbdkit(&[&["-r", "--tls=require", &dir], more].concat(), &[])
    }

    fn files(&self) -> TlsFiles {
        TlsFiles { authorities: Some(self.path("ca-cert.pem")), identity: None }
    }
}

fn open_tls(
    socket: &std::path::Path,
    name: &str,
    tls: TlsFiles,
) -> Result<NbdClient, NbdOpenError> {
    let text = format!("nbds+unix:///?socket={}&tls-hostname={name}", socket.display());
    let open_timeout = Duration::ZERO;
    NbdClient::open(&target(&text), NbdOptions { tls, open_timeout, connections: 3, ..options() })
}

#[test]
fn files_that_are_no_files_are_refused_at_once() {
    let (image, certificates) = (Image::new(), Certificates::sound());
    let _server = certificates.serve(&image, &[]);
    let pipe = certificates.path("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let large = certificates.path("large");
    std::fs::File::create(&large).unwrap().set_len(100 << 30).unwrap();
    let begun = std::time::Instant::now();
    for file in [pipe, "/dev/zero".into(), "/proc/kmsg".into(), large] {
        let sound = certificates.path("ca-cert.pem");
        for tls in [
            TlsFiles { authorities: Some(file.clone()), identity: None },
            TlsFiles { authorities: None, identity: Some((file.clone(), file.clone())) },
            TlsFiles { authorities: Some(sound.clone()), identity: Some((sound, file)) },
        ] {
            let line = open_tls(&image.socket(), "disk.test", tls).err().unwrap().to_string();
            assert!(line.contains("TLS cannot be used") && !line.contains('\n'), "{line}");
        }
    }
    assert!(begun.elapsed() < std::time::Duration::from_secs(20));
}

#[test]
fn encrypted_reads_give_the_files_bytes() {
    let (image, certificates) = (Image::new(), Certificates::sound());
    let _server = certificates.serve(&image, &[]);
    let client = open_tls(&image.socket(), "disk.test", certificates.files()).unwrap();
    for step in [4096, 65_536, 1 << 20] {
        assert!(read_all(&client, step) == image.bytes);
    }
    assert!(all_extents(&client).len() > 4);
}

#[test]
fn encrypted_connections_that_are_cut_cost_no_byte() {
    let (image, certificates) = (Image::new(), Certificates::sound());
    // Its threads would abort it when a connection ends under several of them.
    let _server = certificates.serve(&image, &["--threads=1"]);
    let proxy = proxy(&image.socket());
    let client = open_tls(&proxy.socket(), "disk.test", certificates.files()).unwrap();
    proxy.control.cut_after.store(90_000, Ordering::SeqCst);
    assert!(read_all(&client, 65_536) == image.bytes);
    assert!(proxy.control.connections.load(Ordering::SeqCst) > 2);
}

#[test]
fn encrypted_writes_longer_than_the_sockets_buffers_arrive() {
    let (image, certificates) = (Image::new(), Certificates::sound());
    let dir = format!("--tls-certificates={}", certificates.0.path().display());
    let _server = image.nbdkit(&["--tls=require", &dir], &[]);
    let text = format!("nbds+unix:///?socket={}&tls-hostname=disk.test", image.socket().display());
    let tls = certificates.files();
    let options = NbdOptions { access: Access::ReadWrite, tls, ..options() };
    let client = NbdClient::open(&target(&text), options).unwrap();
    let writes: Vec<_> =
        (0..3_u8).map(|at| write(&client, u64::from(at) << 20, &vec![at + 1; 1 << 20])).collect();
    writes.into_iter().for_each(|write| write.wait().unwrap());
    flush(&client).wait().unwrap();
    let found = std::fs::read(image.path()).unwrap();
    for at in 0..3_u8 {
        let start = usize::from(at) << 20;
        assert!(found[start..start + (1 << 20)].iter().all(|byte| *byte == at + 1));
    }
}

#[test]
fn certificates_that_do_not_fit_are_refused_in_one_line() {
    let image = Image::new();
    let why = |certificates: &Certificates, name: &str, tls: TlsFiles| {
        let _server = certificates.serve(&image, &[]);
        let error = open_tls(&image.socket(), name, tls).err().unwrap();
        let line = error.to_string();
        assert!(line.contains("TLS ") && !line.contains('\n'), "{line}");
        assert!(!error.cause.is_transient());
        line
    };
    let sound = Certificates::sound();
    let other_name = why(&sound, "other.test", sound.files());
    assert!(other_name.contains("other.test"), "{other_name}");
    let unknown = why(&sound, "disk.test", Certificates::sound().files());
    assert!(unknown.contains("UnknownIssuer") || unknown.contains("BadSignature"), "{unknown}");
    let of_system = why(&sound, "disk.test", TlsFiles::default());
    // A bare system has no list.
    let is_told =
        of_system.contains("UnknownIssuer") || of_system.contains("no list of authorities");
    assert!(is_told, "{of_system}");
    let expired = Certificates::new("-days 0");
    // It ends with this second.
    thread::sleep(Duration::from_secs(2));
    let expired = why(&expired, "disk.test", expired.files());
    assert!(expired.contains("expired"), "{expired}");
}

#[test]
fn a_server_may_ask_who_we_are() {
    let (image, certificates) = (Image::new(), Certificates::sound());
    let _server = certificates.serve(&image, &["--tls-verify-peer"]);
    let identity = (certificates.path("client-cert.pem"), certificates.path("client-key.pem"));
    let known = TlsFiles { identity: Some(identity), ..certificates.files() };
    let client = open_tls(&image.socket(), "disk.test", known).unwrap();
    assert_eq!(read(&client, 0..9).wait().unwrap(), image.slice(0..9));
    assert!(open_tls(&image.socket(), "disk.test", certificates.files()).is_err());
}

#[test]
fn encryption_is_never_left_out() {
    let (image, certificates) = (Image::new(), Certificates::sound());
    let server = certificates.serve(&image, &[]);
    let plain = NbdOptions { open_timeout: Duration::ZERO, ..options() };
    let error = NbdClient::open(&unix_target(&image.socket(), ""), plain).err().unwrap();
    assert!(error.to_string().contains("the server requires TLS: write nbds:"), "{error}");
    drop(server);
    let _server = image.nbdkit(&["-r", "--tls=off"], &[]);
    let error = open_tls(&image.socket(), "disk.test", certificates.files()).err().unwrap();
    assert!(error.to_string().contains("the server has no TLS"), "{error}");
}

#[test]
fn files_of_tls_that_cannot_be_used_are_told() {
    let certificates = Certificates::sound();
    let why = |tls: TlsFiles| {
        let error = open_tls(std::path::Path::new("/nowhere"), "disk.test", tls).err().unwrap();
        assert!(error.to_string().contains("TLS cannot be used: "), "{error}");
        error.to_string()
    };
    let absent = TlsFiles { authorities: Some("/nowhere/ca".into()), identity: None };
    assert!(why(absent).contains("the file '/nowhere/ca': "));
    let empty = TlsFiles { authorities: Some("/dev/null".into()), identity: None };
    assert!(why(empty).contains("'/dev/null'"));
    let ours = certificates.path("client-cert.pem");
    let no_key = TlsFiles { identity: Some((ours.clone(), ours)), ..certificates.files() };
    assert!(why(no_key).contains("the key '"));
    let no_name = "nbds+unix:///?socket=/nowhere";
    let error = NbdClient::open(&target(no_name), options()).err().unwrap().to_string();
    assert!(error.contains("add tls-hostname=NAME"), "{error}");
}
