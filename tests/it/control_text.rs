//! The text of the control files, byte for byte: other programs read it, and a command may talk to
//! the daemon of another version.

use std::io::{Read, Write};

use crate::common::mount::*;

/// Replaces the lab's directory with `DIR`, and the values of `keys` with `?`.
fn mask(lab: &Lab, text: &str, keys: &[&str]) -> String {
    let mut text = text.replace(&lab.dir().display().to_string(), "DIR");
    for key in keys {
        let key = format!("\"{key}\":");
        let mut parts = text.split(key.as_str());
        let mut masked = parts.next().unwrap().to_owned();
        for part in parts {
            // No masked string has a comma or a brace in it, and `null` and objects stay.
            let len = match part.as_bytes()[0] {
                b'n' | b'{' => 0,
                _ => part.find([',', '}']).unwrap(),
            };
            masked += &format!("{key}{}{}", if len > 0 { "?" } else { "" }, &part[len..]);
        }
        text = masked;
    }
    text
}

/// Sends `request` to a control file and returns the answer, without progress reports.
fn ask(lab: &Lab, ctl: &str, request: &str) -> String {
    let mut file = lab.open(&format!("m/.cowslip/{ctl}"));
    file.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    file.read_to_string(&mut answer).unwrap();
    let lines = answer.lines().filter(|line| !line.starts_with("{\"progress\":"));
    mask(lab, &lines.collect::<Vec<_>>().join("\n"), &["file", "changed", "taken"])
}

fn status(lab: &Lab, file: &str) -> String {
    let text = std::fs::read_to_string(lab.path(file)).unwrap();
    mask(lab, &text, &["pid", "inode", "uuid", "allocated", "free", "used"])
}

/// Mounts disks of every kind.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.host("host", "xfs", 320 * MIB);
    lab.sh("cp base.img host/; truncate -s 8M parted.img
        parted -s parted.img mklabel msdos mkpart primary 1MiB 5MiB
        $COWSLIP mount m b=base.img e=blank:1G,overlay=ov,limit=64M \\
            g=host/base.img,overlay=host/ov,reflink \\
            'i=stream:1M,from=cmd:sleep 600' o=stream:1M,window=128K,to=file:out \\
            p=parted.img,mode=ro,partitions --log log.txt");
    lab.open("m/e").write_all(&[7; 8192]).unwrap();
    lab
}

/// The status of each disk, with masked values.
const STATUS: [(&str, &str); 6] = [
    (
        "b",
        r#"{"name":"b","inode":?,"path":"DIR/m/b","size":4194304,"mode":"cow","state":"ok","error":null,"warning":null,"openers":0,"base":"DIR/base.img","format":"raw","overlay":{"temporary":true,"path":null,"block":4096,"changed":0,"zeroed":0,"allocated":?,"free":?,"recovered":null,"doing":null,"committing":false,"hydration":null,"done":0,"total":0,"limit":null,"chain":[{"name":null,"uuid":?,"changed":0,"zeroed":0,"since":{"changed":0,"zeroed":0}}],"kind":"blocks"},"stream":null,"partitions":[]}"#,
    ),
    (
        "e",
        r#"{"name":"e","inode":?,"path":"DIR/m/e","size":1073741824,"mode":"cow","state":"ok","error":null,"warning":null,"openers":0,"base":"blank:1073741824","overlay":{"temporary":false,"path":"DIR/ov","block":4096,"changed":8192,"zeroed":0,"allocated":?,"free":?,"recovered":null,"doing":null,"committing":false,"hydration":null,"done":0,"total":0,"limit":67108864,"chain":[{"name":null,"uuid":?,"changed":8192,"zeroed":0,"since":{"changed":8192,"zeroed":0}}],"kind":"blocks"},"stream":null,"partitions":[]}"#,
    ),
    (
        "g",
        r#"{"name":"g","inode":?,"path":"DIR/m/g","size":4194304,"mode":"cow","state":"ok","error":null,"warning":null,"openers":0,"base":"DIR/host/base.img","format":"raw","overlay":{"temporary":false,"path":"DIR/host/ov","block":4096,"changed":?,"zeroed":0,"allocated":?,"free":?,"recovered":null,"kind":"reflink"},"stream":null,"partitions":[]}"#,
    ),
    (
        "i",
        r#"{"name":"i","inode":?,"path":"DIR/m/i","size":1048576,"mode":"ro","state":"ok","error":null,"warning":null,"openers":0,"base":"cmd:sleep 600","overlay":null,"stream":{"direction":"in","state":"open","frontier":0,"highest":0,"accepted":0,"window":{"size":0,"used":?},"spill":{"size":null,"used":?},"needed":{"window":0,"spill":0},"sink":null,"source":{"kind":"cmd","description":"cmd:sleep 600","status":"open"}},"partitions":[]}"#,
    ),
    (
        "o",
        r#"{"name":"o","inode":?,"path":"DIR/m/o","size":1048576,"mode":"rw","state":"ok","error":null,"warning":null,"openers":0,"base":"file:DIR/out","overlay":null,"stream":{"direction":"out","state":"open","frontier":0,"highest":0,"accepted":0,"window":{"size":131072,"used":?},"spill":{"size":0,"used":?},"needed":{"window":0,"spill":0},"sink":{"kind":"file","description":"file:DIR/out","status":"open"}},"partitions":[]}"#,
    ),
    (
        "p",
        r#"{"name":"p","inode":?,"path":"DIR/m/p","size":8388608,"mode":"ro","state":"ok","error":null,"warning":null,"openers":0,"base":"DIR/parted.img","format":"raw","overlay":null,"stream":null,"partitions":[{"number":1,"name":"p.p1","offset":1048576,"size":4194304}]}"#,
    ),
];

#[test]
fn status_has_the_known_keys_in_the_known_order() {
    let lab = lab();
    for (name, known) in STATUS {
        let mut text = status(&lab, &format!("m/.cowslip/{name}/status"));
        if name == "g" {
            // The host estimates which blocks are no longer shared.
            text = mask(&lab, &text, &["changed"]);
        }
        assert_eq!(text, format!("{known}\n"));
    }
    let all = mask(&lab, &status(&lab, "m/.cowslip/status"), &["changed"]);
    let disks = STATUS.map(|(_, known)| mask(&lab, known, &["changed"])).join(",");
    let mount = r#"{"mountpoint":"DIR/m","source":"b=base.img","pid":?,"state":"ready","disks":"#;
    assert_eq!(all, format!("{{\"schema\":1,\"mounts\":[{mount}[{disks}]}}]}}\n"));
}

#[test]
fn status_for_other_users_withholds_paths_and_commands() {
    let mut lab = Lab::new();
    lab.base("base.img", 4 * MIB);
    lab.mount(
        "b=base.img,overlay=ov,perm=0644 o=stream:1M,window=128K,to=file:out,perm=0666 \
         -o allow_other",
    );
    lab.sh("chmod 755 .");
    for (name, known) in [
        (
            "b",
            r#"{"name":"b","inode":?,"path":"DIR/m/b","size":4194304,"mode":"cow","state":"ok","error":null,"warning":null,"openers":0,"base":null,"format":"raw","overlay":{"temporary":false,"path":null,"block":4096,"changed":0,"zeroed":0,"allocated":?,"free":?,"recovered":null,"doing":null,"committing":false,"hydration":null,"done":0,"total":0,"limit":null,"chain":[{"name":null,"uuid":null,"changed":0,"zeroed":0,"since":{"changed":0,"zeroed":0}}],"kind":"blocks"},"stream":null,"partitions":[]}"#,
        ),
        (
            "o",
            r#"{"name":"o","inode":?,"path":"DIR/m/o","size":1048576,"mode":"rw","state":"ok","error":null,"warning":null,"openers":0,"base":null,"overlay":null,"stream":{"direction":"out","state":"open","frontier":0,"highest":0,"accepted":0,"window":{"size":131072,"used":?},"spill":{"size":0,"used":?},"needed":{"window":0,"spill":0},"sink":{"kind":"file","description":null,"status":null}},"partitions":[]}"#,
        ),
    ] {
        let file = format!("m/.cowslip/{name}/status");
        let text = lab.sh(&format!("setpriv --reuid 65534 --clear-groups cat {file}"));
        let text = mask(&lab, &text, &["inode", "allocated", "free", "used"]);
        assert_eq!(text, format!("{known}\n"));
    }
}

/// Requests in the order in which they are sent while `b` and `o` are open for writing, and their
/// answers.
const ANSWERS: [(&str, &str, &str); 32] = [
    (
        "ctl",
        r#"{"op":"add","disk":"x=blank:1M","cwd":"/"}"#,
        r#"{"ok":{"lines":["x: 1 MiB, temporary overlay: changes end at umount ('cowslip keep' saves them)"]}}"#,
    ),
    (
        "ctl",
        r#"{"op":"add","disk":"x=blank:1M","cwd":"/"}"#,
        r#"{"error":"there is a disk 'x' in the mount already: give this one another NAME="}"#,
    ),
    (
        "ctl",
        r#"{"op":"remove","name":"x","inode":1}"#,
        r#"{"error":"x is another disk by now, the one that was meant was renamed, removed or replaced: nothing is done: ask again","stale":true}"#,
    ),
    ("ctl", r#"{"op":"remove","name":"x"}"#, r#"{"ok":{"lines":[],"failed":[]}}"#),
    ("ctl", r#"{"op":"remove","name":"b"}"#, r#"{"error":"b is in use","busy":true}"#),
    (
        "ctl",
        r#"{"op":"dig"}"#,
        r#"{"error":"request not understood: unknown variant `dig`, expected one of `drain`, `add`, `remove` at line 1 column 11"}"#,
    ),
    ("b/ctl", r#"{"op":"abort"}"#, r#"{"error":"b: it is no stream: there is nothing to abort"}"#),
    (
        "b/ctl",
        r#"{"op":"finish"}"#,
        r#"{"error":"b is no output stream: there is nothing to finish"}"#,
    ),
    (
        "b/ctl",
        r#"{"op":"abort","inode":1}"#,
        r#"{"error":"b is another disk by now, the one that was meant was renamed, removed or replaced: nothing is done: ask again","stale":true}"#,
    ),
    (
        "b/ctl",
        r#"{"op":"abort","inode":"one"}"#,
        r#"{"error":"request not understood: invalid type: string \"one\", expected u64"}"#,
    ),
    (
        "b/ctl",
        r#"{"op":"difference","inode":null}"#,
        r#"{"ok":{"file":?,"changed":?,"base":{"path":"DIR/base.img","format":"raw"}}}"#,
    ),
    ("b/ctl", r#"{"op":"reset"}"#, r#"{"error":"b: it is open for writing","busy":true}"#),
    (
        "b/ctl",
        r#"{"op":"reset","now":true}"#,
        r#"{"error":"request not understood: unknown field `now`, expected `force`"}"#,
    ),
    ("b/ctl", r#"{"op":"reset","force":true}"#, r#"{"ok":{"line":"b: is identical to its base"}}"#),
    (
        "b/ctl",
        r#"{"op":"prefetch","start":0,"end":4096}"#,
        r#"{"ok":{"line":"b: 4 KiB read into the host's cache"}}"#,
    ),
    (
        "b/ctl",
        r#"{"op":"prefetch","start":4194304,"end":8388608}"#,
        r#"{"error":"b: the range begins past its end: it has 4 MiB"}"#,
    ),
    ("b/ctl", r#"{"op":"hydrate","action":"pause"}"#, r#"{"error":"b: it is not being hydrated"}"#),
    (
        "b/ctl",
        r#"{"op":"clone","name":"c"}"#,
        r#"{"error":"b: the mount has no store: mount with --store DIR, and the disk with overlay=DIR, to clone it"}"#,
    ),
    ("b/ctl", r#"{"op":"keep","dir":"kept"}"#, r#"{"error":"'kept' is not an absolute path"}"#),
    (
        "p/ctl",
        r#"{"op":"prefetch","start":0,"end":4096,"copy":true}"#,
        r#"{"error":"p: it has no overlay to copy into"}"#,
    ),
    (
        "e/ctl",
        r#"{"op":"snapshot","name":"s","sync":true}"#,
        r#"{"ok":{"line":"e: snapshot 's' taken"}}"#,
    ),
    (
        "e/ctl",
        r#"{"op":"snapshots"}"#,
        r#"{"ok":{"snapshots":[{"name":"s","taken":?,"size":1073741824,"changed":?,"zeroed":0,"since":{"changed":?,"zeroed":0}}]}}"#,
    ),
    ("g/ctl", r#"{"op":"snapshot","name":"s"}"#, r#"{"ok":{"line":"g: snapshot 's' taken"}}"#),
    (
        "g/ctl",
        r#"{"op":"snapshots"}"#,
        r#"{"ok":{"snapshots":[{"name":"s","taken":?,"size":4194304,"changed":null,"zeroed":null,"since":null}]}}"#,
    ),
    ("e/ctl", r#"{"op":"difference","since":"s"}"#, r#"{"ok":{"file":?,"changed":?,"base":null}}"#),
    (
        "e/ctl",
        r#"{"op":"commit","force":true}"#,
        r#"{"error":"e: it has snapshots, which show the base as it is: delete them first (cowslip snapshot --delete)","busy":false}"#,
    ),
    (
        "e/ctl",
        r#"{"op":"revert","name":"s"}"#,
        r#"{"ok":{"line":"e: is as it was at snapshot 's'"}}"#,
    ),
    ("e/ctl", r#"{"op":"unsnapshot","name":"s"}"#, r#"{"ok":{"line":"e: snapshot 's' deleted"}}"#),
    (
        "e/ctl",
        r#"{"op":"unsnapshot","name":"s"}"#,
        r#"{"error":"e: there is no snapshot 's': cowslip snapshot --list shows those there are","busy":false}"#,
    ),
    ("e/ctl", r#"{"op":"hydrate"}"#, r#"{"ok":{"line":"e: detached from its base"}}"#),
    (
        "o/ctl",
        r#"{"op":"finish","timeout_ms":1000}"#,
        r#"{"error":"o is open for writing","busy":true}"#,
    ),
    ("i/ctl", r#"{"op":"abort"}"#, r#"{"ok":{"line":"i: aborted"}}"#),
];

#[test]
fn answers_are_the_known_lines() {
    let lab = lab();
    let open = [lab.open("m/b"), lab.open("m/o")];
    for (ctl, request, known) in ANSWERS {
        assert_eq!(ask(&lab, ctl, request), known, "{request}");
    }
    drop(open);
    let finished = r#"{"ok":{"line":"o: finished, 1 MiB in file:DIR/out"}}"#;
    assert_eq!(ask(&lab, "o/ctl", r#"{"op":"finish"}"#), finished);
    // The input stream is incomplete.
    assert_eq!(lab.cowslip("umount m").status.code(), Some(1));
}

#[test]
fn answer_to_a_drain_lists_what_an_unmount_does() {
    let lab = Lab::new();
    lab.mount("e=blank:1G,overlay=ov t=blank:1M");
    lab.open("m/t").write_all(b"x").unwrap();
    let known = r#"{"ok":{"lines":["e: 0 bytes of changes kept in 'DIR/ov'","t: 4 KiB of changes discarded (temporary overlay)"],"failed":[]}}"#;
    assert_eq!(ask(&lab, "ctl", r#"{"op":"drain","streams":"leave"}"#), known);
}

#[test]
fn what_an_unmount_has_said_of_a_disk_stays_true() {
    let lab = Lab::new();
    lab.mount("d=blank:1M");
    lab.open("m/d").write_all(b"x").unwrap();
    let said = ask(&lab, "ctl", r#"{"op":"drain","streams":"leave"}"#);
    assert!(said.contains("d: 4 KiB of changes discarded (temporary overlay)"), "{said}");
    // The unmount has a few seconds for the rest.
    let line = lab.refused(1, "keep m/d kept");
    assert!(line.contains("the mount is being unmounted"), "{line}");
    assert!(!lab.path("kept").exists());
    wait_until("the mount has stayed", || lab.cowslip("keep m/d kept").status.success());
    let said = lab.umount();
    assert!(said.contains("d: 4 KiB of changes kept in '"), "{said}");
}
