//! The picture of a disk: `cowslip map --svg`, and the strip on a terminal.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};

use crate::common::mount::*;
use quick_xml::Reader;
use quick_xml::events::Event;

/// Returns the texts of a picture, which must be well-formed XML with a single root.
fn texts(picture: &str) -> Vec<String> {
    let mut reader = Reader::from_str(picture);
    let (mut texts, mut depth, mut roots) = (Vec::new(), 0, 0);
    loop {
        match reader.read_event().unwrap_or_else(|error| panic!("{error}: {picture}")) {
            Event::Start(element) => {
                roots += usize::from(depth == 0);
                depth += 1;
                element.attributes().for_each(|attribute| {
                    attribute
                        .unwrap()
                        .normalized_value(quick_xml::XmlVersion::Implicit1_0)
                        .unwrap();
                });
                if matches!(element.name().as_ref(), "text" | "title" | "style") {
                    texts.push(String::new());
                }
            }
            Event::Empty(element) => element.attributes().for_each(|attribute| {
                attribute.unwrap().normalized_value(quick_xml::XmlVersion::Implicit1_0).unwrap();
            }),
            Event::End(_) => depth -= 1,
            Event::Text(text) => {
                if let Some(last) = texts.last_mut() {
                    *last += &text;
                }
            }
            Event::GeneralRef(name) => {
                let last = texts.last_mut().unwrap();
                *last += quick_xml::escape::resolve_predefined_entity(&name).unwrap();
            }
            Event::Eof => break,
            other => panic!("{other:?} in a picture"),
        }
    }
    assert_eq!((depth, roots), (0, 1), "{picture}");
    texts.iter().map(|text| text.trim().to_owned()).collect()
}

/// Mounts a disk with data, zeros and holes of its own over a base.
fn lab() -> Lab {
    let mut lab = Lab::new();
    lab.base("base.img", 16 * MIB);
    lab.mount("d=base.img big=blank:16T e=blank:0");
    let file = lab.open("m/d");
    file.write_all_at(&noise(MIB, 2), 2 * MIB).unwrap();
    fallocate(&file, PUNCH, 0..MIB).unwrap();
    fallocate(&file, ZERO, 8 * MIB..9 * MIB).unwrap();
    lab
}

/// Returns the last line of the table, which holds the sums.
fn sums(table: &str) -> String {
    table.lines().last().unwrap().to_owned()
}

#[test]
fn picture_shows_each_layer_with_the_sums_of_the_table() {
    let lab = lab();
    assert_eq!(lab.ok("map m/d --svg map.svg"), "");
    let picture = fs::read_to_string(lab.path("map.svg")).unwrap();
    let texts = texts(&picture);
    for name in ["d, 16 MiB", "the disk", "overlay", "base"] {
        assert!(texts.iter().any(|text| text == name), "{name}: {texts:?}");
    }
    let table = lab.ok("map m/d");
    let of = |kind: &str, from: &str| -> u64 {
        let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        let rows = rows.filter(|words| words.ends_with(&[kind, from]));
        rows.map(|words| words[1].parse::<u64>().unwrap()).sum()
    };
    assert_eq!(of("data", "overlay"), MIB);
    assert!(texts.iter().any(|text| text.starts_with("overlay: 1 MiB data")), "{texts:?}");
    let mib = of("data", "base") as f64 / MIB as f64;
    let legend = format!("base data {mib:.1} MiB");
    assert!(texts.contains(&legend), "{legend}: {texts:?}");
    assert!(sums(&table).starts_with("data "), "{table}");
}

#[test]
fn single_block_of_16_tib_is_visible_and_the_picture_stays_small() {
    let lab = lab();
    let before = lab.ok("map m/big --svg -");
    assert!(!before.contains(r#"<path class="o""#), "{before}");
    let file = lab.open("m/big");
    file.write_all_at(&[1; 4096], 9 * TIB).unwrap();
    let after = lab.ok("map m/big --svg -");
    assert!(texts(&after).iter().any(|text| text == "overlay data 4 KiB"), "{after}");
    assert!(after.contains(r#"<path class="o""#), "{after}");
    // The size is limited for any content.
    for index in 0..20_000 {
        file.write_all_at(&[1; 100], index * 800 * MIB + index % 7 * 8192).unwrap();
    }
    let full = lab.ok("map m/big --svg -");
    texts(&full);
    assert!(full.len() < MIB as usize, "{}", full.len());
    drop(file);
}

#[test]
fn empty_disk_and_unusual_name_can_be_drawn() {
    let lab = Lab::new();
    lab.sh("$COWSLIP mount m '<a&b>\"=blank:1M' e=blank:1M --log log.txt");
    lab.open("m/e").set_len(0).unwrap();
    assert!(texts(&lab.ok("map m/e --svg -"))[0].starts_with("e, 0 bytes"));
    assert_eq!(texts(&lab.ok("map m/<a&b>\" --svg -"))[0], "<a&b>\", 1 MiB");
}

#[test]
fn picture_is_replaced_and_failed_output_gives_one_line() {
    let lab = lab();
    put(&lab.path("map.svg"), b"old");
    assert!(lab.refused(1, "map m/d --svg map.svg").contains("use --overwrite"));
    assert_eq!(fs::read(lab.path("map.svg")).unwrap(), b"old");
    fs::set_permissions(lab.path("map.svg"), fs::Permissions::from_mode(0o600)).unwrap();
    lab.ok("map m/d --svg map.svg --overwrite");
    let picture = fs::read_to_string(lab.path("map.svg")).unwrap();
    assert!(picture.ends_with("</svg>\n"));
    assert_eq!(fs::metadata(lab.path("map.svg")).unwrap().permissions().mode() & 0o777, 0o600);
    let line = lab.refused(1, "map m/d --svg no/map.svg");
    assert!(line.ends_with("No such file or directory: its directory must exist"), "{line}");
    let line = lab.refused(1, "map m/d --svg m");
    assert!(line.ends_with("Is a directory: name a file in it"), "{line}");
    // Failed output is no fault of the mount, and must not look complete.
    for words in ["map m/d", "map m/d --json", "snapshot m/d --list"] {
        let line = lab.sh(&format!("$COWSLIP {words} 2>&1 >/dev/full || echo $?"));
        assert!(line.starts_with("cowslip: cannot print: No space"), "{words}: {line}");
        assert!(line.ends_with("\n1\n"), "{words}: {line}");
    }
    let line = lab.refused(2, "map m/d --svg map.svg --json");
    assert!(line.contains("--json") && line.contains("cannot be used with"), "{line}");
    assert_eq!(lab.sh("ls -A | grep -c cowslip-map || true").trim(), "0");
}

/// Returns the output of `cowslip map m/d` on a terminal of `columns` columns.
fn on_terminal(lab: &Lab, columns: u16, environment: &str) -> String {
    let command = format!("stty cols {columns}; env {environment} $COWSLIP map m/d");
    let text = lab.sh(&format!("script -qec '{command}' /dev/null"));
    text.replace('\r', "")
}

#[test]
fn terminal_output_has_a_colored_strip_above_the_table() {
    let lab = lab();
    let text = on_terminal(&lab, 60, "-u NO_COLOR TERM=xterm-256color");
    let (strip, table) = text.split_once("\n\n").unwrap();
    assert!(strip.contains("the disk  \x1b[0;38;5;"), "{strip:?}");
    for part in
        ["\x1b[0;38;5;208m█", "\x1b[0;38;5;32m█", "base data", "overlay data 1 MiB", "|4 MiB"]
    {
        assert!(strip.contains(part), "{part:?}: {strip:?}");
    }
    assert_eq!(table, lab.ok("map m/d"));
}

#[test]
fn strip_respects_no_color_and_the_terminal_width() {
    let lab = lab();
    for columns in [40, 80, 200] {
        let text = on_terminal(&lab, columns, "NO_COLOR=1 TERM=xterm-256color");
        assert!(!text.contains('\x1b'), "{text:?}");
        let (strip, _) = text.split_once("\n\n").unwrap();
        let disk = strip.lines().find(|line| line.contains("the disk")).unwrap();
        let disk = &disk[disk.find("the disk").unwrap()..];
        assert_eq!(disk.chars().count(), usize::from(columns) - 1, "{strip}");
        assert!(disk.contains('█') && disk.contains('·'), "{strip}");
    }
    let piped = lab.ok("map m/d");
    assert!(!piped.contains("the disk"), "{piped}");
}
