//! A parser for command lines: splits like a POSIX shell, but without any expansion (POSIX XCU
//! 2.2).
//!
//! ```text
//!   zstd -19 | ssh h 'cat > o.zst'   ->   [zstd, -19] | [ssh, h, cat > o.zst]
//! ```
//!
//! cowslip runs no shell, so unquoted shell syntax other than `|` is refused.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::stream::Programs;

/// The reason why a command line cannot be split.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CommandLineError {
    /// The line needs a shell.
    NeedsShell,
    /// A quote or a backslash is unterminated.
    Unterminated,
    /// A program is missing.
    NoProgram,
}

/// Bytes with a special meaning in a shell unless they are quoted.
const SHELL_BYTES: &[u8] = b"><;&$*`";

#[derive(Default)]
struct WordSplitter {
    programs: Vec<Vec<OsString>>,
    words: Vec<OsString>,
    word: Vec<u8>,
    /// Whether a word has started; it may be empty (`''`).
    has_word: bool,
}

impl WordSplitter {
    fn push(&mut self, byte: u8) {
        self.word.push(byte);
        self.has_word = true;
    }

    fn end_word(&mut self) {
        if std::mem::take(&mut self.has_word) {
            self.words.push(OsString::from_vec(std::mem::take(&mut self.word)));
        }
    }

    fn end_program(&mut self) -> Result<(), CommandLineError> {
        self.end_word();
        let words = std::mem::take(&mut self.words);
        if words.first().is_none_or(|program| program.is_empty()) {
            return Err(CommandLineError::NoProgram);
        }
        self.programs.push(words);
        Ok(())
    }
}

/// Splits `line` into words at unquoted blanks, and into programs at unquoted `|`.
pub(crate) fn split_command(line: &OsStr) -> Result<Programs, CommandLineError> {
    let mut splitter = WordSplitter::default();
    let mut bytes = line.as_bytes().iter().copied();
    while let Some(byte) = bytes.next() {
        match byte {
            b' ' | b'\t' | b'\n' => splitter.end_word(),
            b'|' => splitter.end_program()?,
            b'\'' => {
                splitter.has_word = true;
                loop {
                    match bytes.next().ok_or(CommandLineError::Unterminated)? {
                        b'\'' => break,
                        byte => splitter.push(byte),
                    }
                }
            }
            b'"' => double_quoted(&mut bytes, &mut splitter)?,
            b'\\' => match bytes.next().ok_or(CommandLineError::Unterminated)? {
                b'\n' => {}
                byte => splitter.push(byte),
            },
            byte if SHELL_BYTES.contains(&byte) => return Err(CommandLineError::NeedsShell),
            byte => splitter.push(byte),
        }
    }
    splitter.end_program()?;
    Ok(Programs(splitter.programs))
}

/// Reads the rest of a double-quoted part, in which a backslash escapes only `"`, `\`, `$`, `` ` ``
/// and a line end.
fn double_quoted(
    bytes: &mut impl Iterator<Item = u8>,
    splitter: &mut WordSplitter,
) -> Result<(), CommandLineError> {
    splitter.has_word = true;
    loop {
        match bytes.next().ok_or(CommandLineError::Unterminated)? {
            b'"' => return Ok(()),
            b'\\' => match bytes.next().ok_or(CommandLineError::Unterminated)? {
                b'\n' => {}
                byte if b"\"\\$`".contains(&byte) => splitter.push(byte),
                byte => {
                    splitter.push(b'\\');
                    splitter.push(byte);
                }
            },
            b'$' | b'`' => return Err(CommandLineError::NeedsShell),
            byte => splitter.push(byte),
        }
    }
}

/// Joins words that are split already; a word `|` separates programs.
pub(super) fn join_words(words: &[OsString]) -> Result<Programs, CommandLineError> {
    let programs: Vec<Vec<OsString>> =
        words.split(|word| word == "|").map(<[OsString]>::to_vec).collect();
    let is_program = |words: &Vec<OsString>| words.first().is_some_and(|first| !first.is_empty());
    if programs.iter().all(is_program) {
        Ok(Programs(programs))
    } else {
        Err(CommandLineError::NoProgram)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn words(line: &str) -> Vec<Vec<String>> {
        let programs = split_command(OsStr::new(line)).unwrap().0;
        let text = |word: OsString| word.into_string().unwrap();
        programs.into_iter().map(|words| words.into_iter().map(text).collect()).collect()
    }

    fn fault(line: &str) -> CommandLineError {
        split_command(OsStr::new(line)).unwrap_err()
    }

    #[test]
    fn line_is_split_into_words_and_programs() {
        assert_eq!(words("zstd -c"), [["zstd", "-c"]]);
        assert_eq!(words("  a\tb\n"), [["a", "b"]]);
        assert_eq!(words("a|b | c"), [["a"], ["b"], ["c"]]);
        assert_eq!(words("ssh h \"cat > o.zst\""), [["ssh", "h", "cat > o.zst"]]);
        assert_eq!(words("sh -c 'a | b; c'"), [["sh", "-c", "a | b; c"]]);
        assert_eq!(words("a '' \"\""), [["a", "", ""]]);
        assert_eq!(words(r#"a b\ c "d\"e\f" 'g\'"#), [["a", "b c", "d\"e\\f", "g\\"]]);
        assert_eq!(words(r"a\|b \> \$x"), [["a|b", ">", "$x"]]);
        assert_eq!(words("a x=y {b} ~ [c] ? #d"), [["a", "x=y", "{b}", "~", "[c]", "?", "#d"]]);
    }

    #[test]
    fn shell_syntax_is_refused() {
        for line in ["a > b", "a <b", "a; b", "a & b", "a $HOME", "a *.img", "a `b`", "a \"$b\""] {
            assert_eq!(fault(line), CommandLineError::NeedsShell, "{line}");
        }
    }

    #[test]
    fn incomplete_command_line_is_refused() {
        for line in ["a 'b", "a \"b", "a \\", "a \"b\\"] {
            assert_eq!(fault(line), CommandLineError::Unterminated, "{line}");
        }
        for line in ["", "  ", "|", "a |", "| a", "a | | b", "''", "a || b"] {
            assert_eq!(fault(line), CommandLineError::NoProgram, "{line}");
        }
    }

    #[test]
    fn array_of_words_is_split_only_at_pipes() {
        let array =
            |words: &[&str]| join_words(&words.iter().map(OsString::from).collect::<Vec<_>>());
        let programs = array(&["a", "$x", "|", "b c"]).unwrap().0;
        assert_eq!(programs, [vec!["a", "$x"], vec!["b c"]]);
        for words in [&[][..], &["|"], &["a", "|"], &[""]] {
            assert_eq!(array(words), Err(CommandLineError::NoProgram));
        }
    }

    proptest! {
        #[test]
        fn quoted_words_survive_a_round_trip(
            programs in prop::collection::vec(
                prop::collection::vec("[ -~]{1,8}", 1..4), 1..4),
        ) {
            let quote = |word: &String| format!("'{}'", word.replace('\'', r"'\''"));
            let line: Vec<String> = programs
                .iter()
                .map(|words| words.iter().map(quote).collect::<Vec<_>>().join(" "))
                .collect();
            prop_assert_eq!(words(&line.join("|")), &programs[..]);
            let shown = split_command(OsStr::new(&line.join("|"))).unwrap().to_string();
            prop_assert_eq!(words(&shown), programs);
        }

        #[test]
        fn splitter_survives_any_line(line: String) {
            let _ = split_command(OsStr::new(&line));
        }
    }
}
