//! Bases behind HTTP(S): images that nginx serves, mounted, changed and replaced.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::common::mount::*;
use crate::common::random;

/// nginx over the files of a lab.
pub(crate) struct Nginx {
    running: Option<Running>,
    port: u16,
    tls_port: u16,
}

/// What nginx is told; `DIR`, `PORT` and `TLS` are replaced.
const CONFIG: &str = r#"
daemon off; master_process off; user root; pid DIR/nginx.pid; error_log DIR/error.log;
events { worker_connections 256; }
http {
  client_body_temp_path DIR/tmp; proxy_temp_path DIR/tmp; fastcgi_temp_path DIR/tmp;
  uwsgi_temp_path DIR/tmp; scgi_temp_path DIR/tmp;
  log_format line '$status $request_uri $http_range $connection';
  access_log DIR/access.log line;
  default_type application/octet-stream;
  gzip on; gzip_types *; gzip_proxied any; gzip_min_length 1;
  server {
    listen 127.0.0.1:PORT;
    location / { root DIR; }
    location /once/ { alias DIR/; keepalive_requests 1; }
    location /weak/ { alias DIR/; etag off; }
    location /whole/ { alias DIR/; max_ranges 0; }
    location /zipped/ { alias DIR/; max_ranges 0; gzip on; }
    location /page/ { alias DIR/; default_type text/html; max_ranges 0; }
    location /closed/ { return 403; }
    location /moved/ { rewrite ^/moved/(.*)$ /$1?sig=s3cret redirect; }
    location /around/ { return 302 /around/; }
    location /signed/ { if ($arg_sig != s3cret) { return 403; } alias DIR/; }
    location /token/ { if ($http_authorization != "Bearer s3cret") { return 401; } alias DIR/; }
  }
  #TLS server {
  #TLS   listen 127.0.0.1:TLSPORT ssl; listen 127.0.0.2:TLSPORT ssl; listen 127.0.0.3:TLSPORT ssl; root DIR;
  #TLS   ssl_certificate DIR/server.pem; ssl_certificate_key DIR/server.key;
  #TLS   ssl_client_certificate DIR/ca.pem; ssl_verify_client optional;
  #TLS   location /known/ { if ($ssl_client_verify != SUCCESS) { return 403; } alias DIR/; }
  #TLS   location /here/ { return 302 https://127.0.0.1:TLSPORT/known/base.img; }
  #TLS   location /there/ { return 302 https://127.0.0.2:TLSPORT/known/base.img; }
  #TLS   location /out/ { return 302 http://127.0.0.1:PORT/base.img?sig=s3cret; }
  #TLS }
}
"#;

impl Nginx {
    pub(crate) fn start(lab: &Lab) -> Self {
        Self::configured(lab, CONFIG)
    }

    /// Serves the same files encrypted too, with the certificate of the lab.
    fn with_tls(lab: &Lab) -> Self {
        Self::configured(lab, &CONFIG.replace("#TLS", ""))
    }

    fn configured(lab: &Lab, config: &str) -> Self {
        let free = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let (port, tls_port) = (free(), free());
        fs::create_dir(lab.path("tmp")).unwrap();
        let config = config
            .replace("DIR", &lab.dir().display().to_string())
            .replace("TLSPORT", &tls_port.to_string())
            .replace("PORT", &port.to_string());
        fs::write(lab.path("nginx.conf"), config).unwrap();
        let mut nginx = Self { running: None, port, tls_port };
        nginx.run(lab);
        nginx
    }

    fn run(&mut self, lab: &Lab) {
        let mut command = lab.command("nginx");
        command.arg("-c").arg(lab.path("nginx.conf")).stdout(Stdio::null()).stderr(Stdio::null());
        self.running = Some(Running(command.spawn().unwrap()));
        wait_until("nginx listens", || TcpStream::connect(("127.0.0.1", self.port)).is_ok());
    }

    fn stop(&mut self) {
        self.running = None;
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    fn tls_url(&self, path: &str) -> String {
        format!("https://127.0.0.1:{}{path}", self.tls_port)
    }
}

/// What was asked for so far: one line a request. nginx writes a line after it has answered.
pub(crate) fn requests(lab: &Lab) -> Vec<String> {
    let read = || fs::read_to_string(lab.path("access.log")).unwrap_or_default();
    let mut log = String::new();
    wait_until("nginx has written its log", || {
        let before = std::mem::replace(&mut log, read());
        thread::sleep(Duration::from_millis(30));
        !log.is_empty() && before == log
    });
    log.lines().map(str::to_owned).collect()
}

/// Makes an authority, and a certificate of a server for `names` that holds for `days`.
fn certify(lab: &Lab, names: &str, days: &str) {
    lab.sh(&format!(
        "key='-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes'
         openssl req -x509 $key -days 9 -subj /CN=authority -keyout ca.key -out ca.pem 2>&1
         echo subjectAltName={names} >server.ext
         for name in server client; do
             openssl req $key -subj /CN=$name -keyout $name.key -out $name.csr 2>&1
             openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial \
                 -extfile server.ext {days} -out $name.pem 2>&1
         done"
    ));
}

/// Writes a file that only its owner can read.
pub(crate) fn secret(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

#[test]
fn an_image_behind_http_is_a_file_after_two_requests() {
    let mut lab = Lab::new();
    lab.base("base.img", 12 * MIB);
    let nginx = Nginx::start(&lab);
    // What is read ahead would be counted too.
    lab.mount(&format!("vm={},mode=ro,ahead=0", nginx.url("/base.img")));
    let at_mount = requests(&lab);
    assert!(at_mount.len() <= 2, "{at_mount:?}");
    // A cold read is one request more, and one of what came with the first none.
    let mut options = fs::File::options();
    let file = options.read(true).custom_flags(libc::O_DIRECT).open(lab.path("m/vm")).unwrap();
    let mut buf = Aligned::of(&[0; 4096]);
    file.read_exact_at(buf.bytes_mut(), 0).unwrap();
    assert_eq!(requests(&lab).len(), at_mount.len());
    file.read_exact_at(buf.bytes_mut(), 7 * MIB).unwrap();
    assert_eq!(requests(&lab).len(), at_mount.len() + 1);
    let image = fs::read(lab.path("base.img")).unwrap();
    assert_eq!(buf.bytes(), &image[7 * MIB as usize..][..4096]);
    lab.sh("cmp base.img m/vm; qemu-img compare -f raw -F raw m/vm base.img");
    let asked = requests(&lab);
    assert!(asked.iter().all(|line| line.starts_with("206 ")), "{asked:?}");
    let status = lab.disk("vm");
    assert_eq!(status["base"], nginx.url("/base.img"));
    assert_eq!(
        (&status["remote"]["size"], &status["remote"]["failures"]),
        (&(12 * MIB).into(), &0.into())
    );
    assert!(!lab.log().contains("names no version"), "{}", lab.log());
    drop(file);
    lab.umount();
    let line = lab.refused(2, &format!("mount m vm={},mode=rw", nginx.url("/base.img?s3cret")));
    assert!(line.contains("which is only read") && !line.contains("s3cret"), "{line}");
}

#[test]
fn changes_stay_in_the_overlay_and_belong_to_the_version() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 8 * MIB);
    let nginx = Nginx::start(&lab);
    let disk = format!("vm={},overlay=vm.cow", nginx.url("/base.img"));
    lab.mount(&disk);
    lab.open("m/vm").write_all_at(b"changed", 3 * MIB + 5).unwrap();
    let shown = lab.sh("cat m/vm | md5sum");
    lab.umount();
    let before = requests(&lab).len();
    lab.mount(&disk);
    assert!(requests(&lab).len() - before <= 2, "{:?}", requests(&lab));
    assert_eq!(lab.sh("cat m/vm | md5sum"), shown);
    let line = lab.refused(1, "commit m/vm");
    assert!(line.contains("an image behind HTTP is only read"), "{line}");
    lab.umount();
    let checked = lab.ok("check vm.cow");
    assert!(checked.contains("unchanged"), "{checked}");

    // To a mirror that names it otherwise, to the file itself, and back: the bytes are the same.
    lab.sh("mkdir mirror; cp base.img mirror; touch -d 2020-01-01 mirror/base.img");
    lab.ok(&format!("rebase vm.cow --base {}", nginx.url("/mirror/base.img")));
    lab.ok("rebase vm.cow --base base.img");
    lab.mount("vm=base.img,overlay=vm.cow");
    assert_eq!(lab.sh("cat m/vm | md5sum"), shown);
    lab.umount();
    lab.ok(&format!("rebase vm.cow --base {}", nginx.url("/base.img")));
    lab.mount(&disk);
    assert_eq!(lab.sh("cat m/vm | md5sum"), shown);
    lab.umount();
    // nginx makes an ETag of the size and the second.
    lab.sh("printf x | dd of=mirror/base.img bs=1 seek=100 conv=notrunc status=none; touch -d 2020-01-02 mirror/base.img");
    let line = lab.refused(1, &format!("rebase vm.cow --base {}", nginx.url("/mirror/base.img")));
    assert!(line.contains("its contents differ"), "{line}");

    // Another version at the same address.
    lab.sh("cp base.img new; touch -d 2021-01-01 new; mv new base.img");
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("does not fit its base") && line.contains("version \""), "{line}");
    let line = lab.refused(1, "rebase vm.cow --base mirror/base.img");
    assert!(line.contains("cannot be compared") && line.contains("has changed"), "{line}");
    lab.sh("rm base.img");
    let line = lab.refused(1, &format!("mount m {disk}"));
    assert!(line.contains("404 Not Found") && line.contains(&nginx.url("/base.img")), "{line}");
}

#[test]
fn an_image_that_is_replaced_while_it_is_mounted_is_noticed() {
    for place in ["/base.img", "/weak/base.img"] {
        let lab = Lab::new();
        lab.file_with_holes("base.img", 8 * MIB);
        let nginx = Nginx::start(&lab);
        lab.mount(&format!("vm={},overlay=vm.cow", nginx.url(place)));
        lab.open("m/vm").write_all_at(&[7; 4096], 6 * MIB).unwrap();
        lab.sh("cp base.img new; touch -d 2021-01-01 new; mv new base.img");
        let file = lab.open_ro("m/vm");
        assert_eq!(errno_of(file.read_at(&mut [0; 4096], MIB)), libc::EIO);
        assert_eq!(errno_of(file.read_at(&mut [0; 4096], 3 * MIB)), libc::EIO);
        // What the overlay has is still there.
        assert_eq!(read(&file, 6 * MIB, 4096), [7; 4096]);
        let log = lab.log();
        assert_eq!(log.matches("the image is another one by now").count(), 1, "{log}");
        assert_eq!(log.contains("names no version of the image"), place != "/base.img", "{log}");
    }
}

#[test]
fn random_changes_over_an_image_behind_http_are_those_of_a_file() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let nginx = Nginx::start(&lab);
    random::model(&lab, "base.img", &format!("d={},overlay=o", nginx.url("/once/base.img")));
}

/// A proxy at a port of its own, whose connections end after a few ten thousand bytes each.
fn cutting(port: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        for (number, client) in listener.incoming().enumerate() {
            let (mut client, mut server) =
                (client.unwrap(), TcpStream::connect(("127.0.0.1", port)).unwrap());
            let (mut to_server, mut from_client) =
                (server.try_clone().unwrap(), client.try_clone().unwrap());
            thread::spawn(move || io::copy(&mut from_client, &mut to_server));
            thread::spawn(move || {
                // Long enough for the head of an answer.
                let most = 2_000 + (number as u64 * 7919) % 60_000;
                let _ = io::copy(&mut (&mut server).take(most), &mut client);
                let _ = client.shutdown(Shutdown::Both);
                let _ = server.shutdown(Shutdown::Both);
            });
        }
    });
    own
}

#[test]
fn random_changes_while_connections_are_cut_are_those_of_a_file() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    let nginx = Nginx::start(&lab);
    let url = format!("http://127.0.0.1:{}/base.img", cutting(nginx.port));
    random::model(&lab, "base.img", &format!("d={url},overlay=o"));
    let shorter = requests(&lab).iter().filter(|line| !line.contains("bytes=0-")).count();
    assert!(shorter > 20, "{shorter}");
}

#[test]
fn qcow2_images_are_read_over_http() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 8 * MIB);
    lab.sh("qemu-img convert -c -f raw -O qcow2 base.img packed.qcow2
            qemu-img convert -f raw -O qcow2 base.img plain.qcow2");
    let nginx = Nginx::start(&lab);
    for image in ["packed", "plain"] {
        let url = nginx.url(&format!("/once/{image}.qcow2"));
        let line = lab.refused(1, &format!("mount m vm={url},mode=ro"));
        assert!(line.contains("looks like a qcow2 image: add ,format=qcow2"), "{line}");
        let disk = format!("vm={url},format=qcow2,overlay={image}.cow");
        lab.mount(&disk);
        lab.sh("cmp base.img m/vm");
        let data: u64 = data_runs(&lab.open_ro("m/vm")).iter().map(|run| run.end - run.start).sum();
        assert!(data < 7 * MIB);
        lab.open("m/vm").write_all_at(b"changed", MIB).unwrap();
        lab.umount();
        lab.mount(&disk);
        assert_eq!(read(&lab.open_ro("m/vm"), MIB, 7), b"changed");
        lab.umount();
    }
}

#[test]
fn what_is_no_image_behind_http_is_one_line() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    lab.sh("seq 100000 >text.img; : >empty.img");
    let mut nginx = Nginx::start(&lab);
    let refused = |path: &str| {
        let line = lab.refused(1, &format!("mount m vm={}?s3cret,mode=ro", nginx.url(path)));
        assert!(line.contains("http://127.0.0.1:") && !line.contains("s3cret"), "{line}");
        line
    };
    for (path, why) in [
        ("/none.img", "404 Not Found"),
        ("/closed/base.img", "403 Forbidden"),
        ("/token/base.img", "401 Unauthorized"),
        ("/whole/base.img", "serves no ranges"),
        ("/page/base.img", "web page (text/html)"),
        ("/empty.img", "the image is empty"),
        ("/around/", "more than 10 redirects"),
    ] {
        let line = refused(path);
        assert!(line.contains(why), "{path}: {line}");
    }
    // What nginx would compress for others comes as it is.
    lab.mount(&format!("vm={},mode=ro", nginx.url("/text.img")));
    lab.sh("cmp text.img m/vm");
    lab.umount();
    nginx.stop();
    let line = lab.refused(1, &format!("mount m vm={},mode=ro", nginx.url("/base.img")));
    assert!(line.contains("cannot connect: Connection refused"), "{line}");
}

#[test]
fn secrets_of_an_address_and_of_auth_are_shown_nowhere() {
    let mut lab = Lab::new();
    lab.base("base.img", 2 * MIB);
    let nginx = Nginx::start(&lab);
    let signed = format!("vm={}?sig=s3cret,overlay=vm.cow", nginx.url("/signed/base.img"));
    let shown = |lab: &Lab| {
        let told = lab.ok("status m") + &lab.ok("status m --json") + &lab.log();
        let told = told + &lab.sh("cat /proc/self/mountinfo; cat vm.cow/stack 2>&1 || true");
        assert!(!told.contains("s3cret"), "{told}");
        told
    };
    lab.mount(&signed);
    lab.sh("cmp base.img m/vm");
    assert!(shown(&lab).contains(&nginx.url("/signed/base.img")));
    lab.umount();
    // A clone takes the image as it is open.
    let stored = signed.replace("vm.cow", "store");
    lab.mount(&format!("{stored} --store store"));
    lab.ok("clone m/vm m/copy");
    lab.sh("cmp base.img m/copy; ! grep -r s3cret store");
    lab.umount();
    // What was signed is not recorded, and has to be given again.
    let plain = signed.replace("?sig=s3cret", "");
    let line = lab.refused(1, &format!("mount m {plain}"));
    assert!(line.contains("403 Forbidden") && line.contains("with its query"), "{line}");
    lab.mount(&signed);
    lab.umount();

    secret(&lab.path("token"), "Authorization: Bearer s3cret\n");
    let url = nginx.url("/token/base.img");
    for auth in ["auth=token", "auth=cmd:cat token"] {
        let source = format!("vm={url},mode=ro,{auth}");
        let output = lab.output(COWSLIP, &["mount", "m", &source, "--log", "log.txt"]);
        assert!(output.status.success(), "{}", show(&output));
        lab.sh("cmp base.img m/vm");
        shown(&lab);
        lab.umount();
    }
    // A redirect to a signed address on the same host.
    lab.mount(&format!("vm={},mode=ro", nginx.url("/moved/signed/base.img")));
    lab.sh("cmp base.img m/vm");
    shown(&lab);
    let asked = requests(&lab);
    assert_eq!(asked.iter().filter(|line| line.starts_with("302 /moved/")).count(), 1);
    lab.umount();
    for (keys, why) in [
        ("mode=ro,auth=nowhere", "nowhere': No such file"),
        ("mode=ro,auth=base.img", "chmod 600"),
        ("mode=ro,auth=cmd:false", "auth=cmd:false: it ended with exit status: 1"),
    ] {
        let line = lab.refused(1, &format!("mount m vm={url},{keys}"));
        assert!(line.contains(why), "{line}");
    }
    let line = lab.refused(2, &format!("mount m vm={url}?s3cret,auht=x"));
    assert!(line.contains("did you mean 'auth'") && !line.contains("s3cret"), "{line}");
}

#[test]
fn another_user_does_not_decide_which_secrets_and_authorities_are_used() {
    let mut lab = Lab::new();
    lab.base("base.img", MIB);
    certify(&lab, "IP:127.0.0.1", "-days 9");
    let nginx = Nginx::with_tls(&lab);
    secret(&lab.path("token"), "Authorization: Bearer s3cret\n");
    // Links of another user to root's files, files that root has put into that user's directory, and
    // second names of files where everybody may make some.
    lab.sh("mkdir links own names; chmod 1777 names
         for file in token ca.pem client.pem client.key; do
             ln -s ../$file links; cp -p $file own; ln $file names
         done
         chown -h 12345 links links/* own");
    let token = |dir: &str| format!("{},mode=ro,auth={dir}token", nginx.url("/token/base.img"));
    let tls = |[ca, cert, key]: [&str; 3]| {
        let url = nginx.tls_url("/known/base.img");
        format!("{url},mode=ro,tls-ca={ca}ca.pem,tls-cert={cert}client.pem,tls-key={key}client.key")
    };
    for (dir, why) in [
        ("links/", "belongs to another user (uid 12345), who can change it: name what it leads to"),
        (
            "own/",
            "own' belongs to another user (uid 12345), who can change it: move it, or use --trust",
        ),
        ("names/", "has more than one name, and another user could have made this one"),
    ] {
        for source in [token(dir), tls([dir, "", ""]), tls(["", dir, ""]), tls(["", "", dir])] {
            let line = lab.refused(1, &format!("mount m vm={source}"));
            assert!(line.contains(why) && !line.contains("s3cret"), "{source}: {line}");
        }
    }
    lab.sh("rm -r names");
    let mounts = |lab: &Lab, words: &str| {
        lab.mount(words);
        lab.sh("cmp base.img m/vm");
        lab.umount();
    };
    for source in [token("own/"), tls(["own/"; 3])] {
        mounts(&lab, &format!("vm={source} --trust own"));
    }
    // Links of root's lead on.
    lab.sh("chown -h 0 links links/*");
    for source in [token("links/"), tls(["links/"; 3])] {
        mounts(&lab, &format!("vm={source}"));
    }
}

#[test]
fn an_encrypted_server_is_believed_by_its_certificate_alone() {
    let mut lab = Lab::new();
    lab.base("base.img", 2 * MIB);
    certify(&lab, "IP:127.0.0.1,IP:127.0.0.2", "-days 9");
    let nginx = Nginx::with_tls(&lab);
    let url = nginx.tls_url("/base.img");
    lab.mount(&format!("vm={url},mode=ro,tls-ca=ca.pem"));
    lab.sh("cmp base.img m/vm");
    lab.umount();
    let known = nginx.tls_url("/known/base.img");
    let keys = "mode=ro,tls-ca=ca.pem";
    let known_by = format!("{keys},tls-cert=client.pem,tls-key=client.key");
    for url in [known.clone(), nginx.tls_url("/here/")] {
        lab.mount(&format!("vm={url},{known_by}"));
        lab.sh("cmp base.img m/vm");
        lab.umount();
    }
    let by_other_name = url.replace("127.0.0.1", "127.0.0.3");
    for (source, why) in [
        (format!("{known},{keys}"), "403 Forbidden"),
        // Our certificate is for the host of the address alone.
        (format!("{},{known_by}", nginx.tls_url("/there/")), "redirected to 127.0.0.2:"),
        // The authority is unknown, and a bare system knows none at all.
        (format!("{url},mode=ro"), "TLS "),
        (format!("{by_other_name},{keys}"), "not valid for name"),
        (format!("{},{keys}", nginx.url("/base.img").replace("http", "https")), "TLS failed"),
        (
            format!("{},{keys}", nginx.tls_url("/out/")),
            "out of the encryption, to http://127.0.0.1:",
        ),
        (format!("{url},mode=ro,tls-ca=nowhere.pem"), "nowhere.pem"),
    ] {
        let line = lab.refused(1, &format!("mount m vm={source}"));
        assert!(line.contains(why) && !line.contains("s3cret"), "{why}: {line}");
    }
}

#[test]
fn a_trace_brings_the_next_mount_what_this_one_has_read() {
    let mut lab = Lab::new();
    lab.base("base.img", 64 * MIB);
    let nginx = Nginx::start(&lab);
    let source = format!("vm={},mode=ro,trace=vm.trace", nginx.url("/base.img"));
    let places: Vec<u64> = (0..40).map(|n| n * 23 % 40 * (3 * MIB / 2)).collect();
    let read_all = |lab: &Lab| {
        let (file, base) = (lab.open_ro("m/vm"), lab.open_ro("base.img"));
        rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::Random).unwrap();
        for place in &places {
            assert!(read(&file, *place, 20_000) == read(&base, *place, 20_000));
        }
    };
    // What came with the mount counts, too.
    let kept = |lab: &Lab| lab.disk("vm")["remote"]["cached"].as_u64().unwrap();
    lab.mount(&source);
    read_all(&lab);
    let before = kept(&lab);
    lab.umount();
    let text = fs::read_to_string(lab.path("vm.trace")).unwrap();
    let lens =
        text.lines().skip(1).map(|line| line.split_once(' ').unwrap().1.parse::<u64>().unwrap());
    let touched: u64 = lens.sum();
    assert!((40 * 20_000..before).contains(&touched), "{touched} of {before}: {text}");
    lab.mount(&source);
    wait_until("the trace is fetched", || kept(&lab) >= touched);
    let asked = requests(&lab).len();
    read_all(&lab);
    assert_eq!(requests(&lab).len(), asked);
    // The head of the image came with the mount.
    assert!(kept(&lab) <= touched + touched / 10 + 512 * 1024, "{} of {touched}", kept(&lab));
    lab.umount();
    assert_eq!(fs::read_to_string(lab.path("vm.trace")).unwrap(), text);
    lab.sh("echo nonsense >vm.trace");
    let line = lab.refused(1, &format!("mount m {source}"));
    assert!(line.contains("vm.trace': it is no trace"), "{line}");
    let line = lab.refused(1, &format!("mount m {}", source.replace("vm.trace", "/dev/zero")));
    assert!(line.contains("/dev/zero"), "{line}");
}

#[test]
fn the_keys_of_a_server_are_for_every_command_and_every_disk_of_a_store() {
    let mut lab = Lab::new();
    lab.base("base.img", 2 * MIB);
    certify(&lab, "IP:127.0.0.1", "-days 9");
    let nginx = Nginx::with_tls(&lab);
    let (url, host) = (nginx.tls_url("/known/base.img"), nginx.tls_url("/"));
    let keys = "tls-ca=ca.pem,tls-cert=client.pem,tls-key=client.key";
    let server = format!("--server {host},{keys}");
    lab.mount(&format!("{server} --store store vm={url},overlay=store"));
    lab.ok("clone m/vm m/copy");
    lab.sh("echo changed | dd of=m/copy conv=notrunc status=none; cp m/copy copy.img");
    lab.umount();
    // Without the keys, the disks are not mounted, and the check says why.
    let line = lab.refused(1, "mount m --store store");
    assert!(line.contains("TLS"), "{line}");
    let checked = lab.cowslip("check store");
    assert!(!checked.status.success(), "{}", show(&checked));
    assert!(lab.ok(&format!("check {server} store")).contains(&url));
    lab.sh(&format!(
        "printf 'mountpoint = \"m\"\\nstore = \"store\"\\nserver = [\"{host},{keys}\"]\\n' >vm.toml"
    ));
    lab.ok("mount --config vm.toml");
    lab.sh("cmp base.img m/vm; cmp copy.img m/copy");
    lab.umount();
    lab.ok(&format!("rebase {server} store/names/vm --base base.img"));
    lab.ok(&format!("rebase {server} store/names/vm --base {url}"));
    // Keys for another host are kept from this one, and a disk's own keys count alone.
    let other = host.replace("127.0.0.1", "127.0.0.2");
    let line = lab.refused(1, &format!("mount m --store store --server {other},{keys}"));
    assert!(line.contains("TLS"), "{line}");
    let line = lab.refused(1, &format!("mount m {server} vm={url},mode=ro,tls-ca=ca.pem"));
    assert!(line.contains("403 Forbidden"), "{line}");
    let line = lab.refused(2, &format!("mount m --server {host}?s3cret,{keys} vm={url},mode=ro"));
    assert!(line.contains("is no beginning of addresses") && !line.contains("s3cret"), "{line}");
}

#[test]
fn a_certificate_that_has_expired_is_refused() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    certify(&lab, "IP:127.0.0.1", "-days 0");
    thread::sleep(Duration::from_millis(1100));
    let nginx = Nginx::with_tls(&lab);
    let source = format!("vm={},mode=ro,tls-ca=ca.pem", nginx.tls_url("/base.img"));
    let line = lab.refused(1, &format!("mount m {source}"));
    assert!(line.contains("TLS failed") && line.contains("expired"), "{line}");
}

#[test]
fn an_outage_of_http_is_waited_for_and_heals() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", 32 * MIB);
    let mut nginx = Nginx::start(&lab);
    let disk = format!("vm={},mode=ro", nginx.url("/base.img"));
    lab.mount(&format!("-o io_timeout=20 {disk}"));
    let image = fs::read(lab.path("base.img")).unwrap();
    let file = lab.open_ro("m/vm");
    nginx.stop();
    let at = 11 * MIB as usize;
    thread::scope(|scope| {
        let reader =
            scope.spawn(|| assert_eq!(read(&file, at as u64, 65_536), image[at..at + 65_536]));
        wait_until("the status tells of the outage", || {
            let remote = lab.disk("vm")["remote"].clone();
            remote["waiting"].as_u64().is_some_and(|secs| secs >= 1)
                && remote["outage"].as_str().is_some_and(|why| why.contains("Connection refused"))
                && lab.log().contains("asking on")
        });
        nginx.run(&lab);
        reader.join().unwrap();
    });
    lab.sh("cmp base.img m/vm");
    assert_eq!(lab.disk("vm")["remote"]["failures"], 0);
    assert!(lab.log().contains("it answers again"), "{}", lab.log());
    drop(file);

    // One that is longer than io_timeout fails what waits, and nothing that comes after it.
    lab.umount();
    lab.mount(&format!("-o io_timeout=2 {disk}"));
    let file = lab.open_ro("m/vm");
    nginx.stop();
    let mut buf = [0; 4096];
    assert_eq!(errno_of(file.read_at(&mut buf, at as u64)), libc::EIO);
    nginx.run(&lab);
    wait_until("it heals", || file.read_at(&mut buf, at as u64).is_ok());
    assert_eq!(buf, image[at..at + 4096]);
}

#[test]
fn what_was_fetched_over_http_stays_for_the_next_mount() {
    let mut lab = Lab::new();
    lab.base("base.img", 8 * MIB);
    let nginx = Nginx::start(&lab);
    // Another signature is the same image.
    let mount = |query: &str| {
        lab.mount(&format!("vm={}{query},mode=ro,read-cache=kept", nginx.url("/base.img")));
        lab.sh("cmp base.img m/vm");
        lab.umount();
    };
    mount("?sig=1");
    let before = requests(&lab).len();
    mount("?sig=2");
    assert_eq!(requests(&lab).len() - before, 1);
}

#[test]
fn the_proxy_that_the_environment_names_is_asked() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    let nginx = Nginx::start(&lab);
    // nginx answers a request for a whole address as one for its path.
    let mount = |proxy: &str, not: &str| {
        let mut command = lab.command(COWSLIP);
        command.args(["mount", "m", "vm=http://images.invalid/base.img,mode=ro"]);
        command.env("http_proxy", proxy).env("no_proxy", not).output().unwrap()
    };
    let output = mount(&nginx.url(""), "");
    assert!(output.status.success(), "{}", show(&output));
    lab.sh("cmp base.img m/vm");
    lab.umount();
    let line = one_line(1, &mount(&nginx.url(""), ".invalid"), "no_proxy");
    assert!(line.contains("cannot find the host"), "{line}");
    let line =
        one_line(1, &mount("http://me:s3cret@127.0.0.1:1/", ""), "a proxy that is not there");
    assert!(line.contains("cannot connect") && !line.contains("s3cret"), "{line}");
}

/// A proxy that leads everything to `port`, asked by SOCKS 5 (RFC 1928) or by CONNECT (RFC 9110, 9.3.6);
/// and the number of its connections.
fn tunnelling(port: u16) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let own = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&count);
    thread::spawn(move || {
        for client in listener.incoming() {
            let mut client = client.unwrap();
            let mut first = [0; 2];
            client.read_exact(&mut first).unwrap();
            if first[0] == 5 {
                client.read_exact(&mut vec![0; first[1].into()]).unwrap();
                client.write_all(&[5, 0]).unwrap();
                // Version, command, 0, the kind of a name, and its length.
                let mut head = [0; 5];
                client.read_exact(&mut head).unwrap();
                assert_eq!((head[1], head[3]), (1, 3), "to a host by its name");
                client.read_exact(&mut vec![0; usize::from(head[4]) + 2]).unwrap();
                client.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).unwrap();
            } else {
                let mut head = first.to_vec();
                while !head.ends_with(b"\r\n\r\n") {
                    client.read_exact(&mut first[..1]).unwrap();
                    head.push(first[0]);
                }
                assert!(head.starts_with(b"CONNECT 127.0.0.1:"), "{head:?}");
                client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").unwrap();
            }
            counted.fetch_add(1, Ordering::SeqCst);
            let mut server = TcpStream::connect(("127.0.0.1", port)).unwrap();
            let mut to_server = server.try_clone().unwrap();
            let mut from_client = client.try_clone().unwrap();
            thread::spawn(move || io::copy(&mut from_client, &mut to_server));
            thread::spawn(move || io::copy(&mut server, &mut client));
        }
    });
    (own, count)
}

#[test]
fn tunnels_of_proxies_are_used() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    certify(&lab, "IP:127.0.0.1", "-days 9");
    let nginx = Nginx::with_tls(&lab);
    let secure = format!("{},tls-ca=ca.pem", nginx.tls_url("/base.img"));
    let plain = "http://images.invalid/base.img".to_owned();
    for (variable, scheme, url, port) in [
        ("https_proxy", "http", secure, nginx.tls_port),
        ("all_proxy", "socks5h", plain, nginx.port),
    ] {
        let (proxy, count) = tunnelling(port);
        let mut command = lab.command(COWSLIP);
        command.env(variable, format!("{scheme}://127.0.0.1:{proxy}"));
        let output = command.args(["mount", "m", &format!("vm={url},mode=ro")]).output().unwrap();
        assert!(output.status.success(), "{}", show(&output));
        lab.sh("cmp base.img m/vm");
        assert!(count.load(Ordering::SeqCst) > 0);
        lab.umount();
    }
}

#[test]
fn the_threads_of_http_start_with_the_first_image() {
    let lab = Lab::new();
    lab.file_with_holes("base.img", MIB);
    let nginx = Nginx::start(&lab);
    let count = || {
        let names = threads_of(lab.pid()).into_iter();
        let names = names.map(|dir| fs::read_to_string(dir.join("comm")).unwrap_or_default());
        names.filter(|name| name.starts_with("cowslip-http")).count()
    };
    lab.mount("vm=base.img");
    assert_eq!(count(), 0);
    lab.umount();
    let more = format!("a={0},mode=ro b={0}?other,mode=ro", nginx.url("/base.img"));
    lab.mount(&more);
    lab.sh("cmp base.img m/a; cmp base.img m/b");
    thread::sleep(Duration::from_millis(50));
    assert_eq!(count(), 2);
    lab.umount();
}
