//! One key: its type, and how its value is read, stored and checked.

use std::ffi::{OsStr, OsString};
use std::path::{Path, PathBuf};

use crate::config::error::{self, parse_decimal};
use crate::config::raw_value::{RawValue, absolute};
use crate::config::{
    DiskMode, DiskSource, DiskSpec, Flow, RemoteSpec, SpecError, StreamSpec, parse_size,
};

/// The setting of a switch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Switch {
    On,
    Off,
}

/// The kinds of disks that a key applies to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyScope {
    All,
    /// Disks with random access, including blank ones.
    Disks,
    /// Files, devices, and images on servers.
    Files,
    /// Files and devices of this host.
    HostFiles,
    /// Images on servers.
    Remote,
    Cow,
    /// Streams in either direction.
    Streams,
    /// Output streams.
    Outputs,
    /// Input streams.
    Inputs,
}

/// The type of a key's value, and the function that stores the value in the spec.
pub(super) enum KeySetter {
    Switch(fn(&mut DiskSpec, Switch)),
    Size(fn(&mut DiskSpec, u64) -> Result<(), SpecError>),
    Id(fn(&mut DiskSpec, u32)),
    /// A number that counts from 1.
    Ordinal(fn(&mut DiskSpec, u32)),
    Perm(fn(&mut DiskSpec, u16)),
    Word(fn(&mut DiskSpec, &str) -> Result<(), SpecError>),
    Path(fn(&mut DiskSpec, PathBuf)),
    RemoteSize(fn(&mut RemoteSpec, u64) -> Result<(), SpecError>),
    RemoteOrdinal(fn(&mut RemoteSpec, u32) -> Result<(), SpecError>),
    RemotePath(fn(&mut RemoteSpec, PathBuf)),
    /// Called with the value and the directory of relative paths.
    RemoteText(fn(&mut RemoteSpec, &OsStr, &Path) -> Result<(), SpecError>),
    /// The sink or source of a stream; called with the value and the directory of relative paths.
    Flow(fn(&RawValue, &Path) -> Result<Flow, SpecError>),
    StreamSize(fn(&mut StreamSpec, u64)),
    StreamWord(fn(&mut StreamSpec, &str) -> Result<(), SpecError>),
    /// A word, which may be `on` or `off`; the key alone means `on`.
    StreamSwitchWord(fn(&mut StreamSpec, &str) -> Result<(), SpecError>),
    StreamSwitch(fn(&mut StreamSpec, Switch) -> Result<(), SpecError>),
}

/// A row of the table of keys.
pub(super) struct DiskKey {
    pub(super) name: &'static str,
    pub(super) scope: KeyScope,
    pub(super) set: KeySetter,
    /// An example of a value, for messages.
    pub(super) sample: &'static str,
}

impl DiskKey {
    pub(super) fn is_flow(&self) -> bool {
        matches!(self.set, KeySetter::Flow(_))
    }

    /// Checks that a stream has only keys for streams, and another disk none of them.
    pub(super) fn check_kind(&self, disk: &DiskSpec) -> Result<(), SpecError> {
        let is_stream = matches!(disk.source, DiskSource::Stream(_));
        let why = match self.scope {
            KeyScope::Streams | KeyScope::Outputs | KeyScope::Inputs if !is_stream => {
                "is only for streams, NAME=stream:SIZE: drop it"
            }
            KeyScope::Remote if !matches!(disk.source, DiskSource::Remote(_)) => {
                "is only for images on servers, such as NAME=nbd://HOST/EXPORT or NAME=https://HOST/PATH: drop it"
            }
            KeyScope::Disks | KeyScope::Files | KeyScope::HostFiles | KeyScope::Cow
                if is_stream =>
            {
                "is not for streams: drop it"
            }
            KeyScope::HostFiles if matches!(disk.source, DiskSource::Remote(_)) => {
                "is for files of this host, and this image is on a server: drop it"
            }
            _ => return Ok(()),
        };
        Err(SpecError::key(self.name, why))
    }

    /// Parses `value` and stores it in `disk`.
    pub(super) fn set_value(
        &self,
        disk: &mut DiskSpec,
        value: &RawValue,
        dir: &Path,
    ) -> Result<(), SpecError> {
        if let (KeySetter::Flow(read), DiskSource::Stream(stream)) = (&self.set, &mut disk.source) {
            if !matches!(value, RawValue::Array(_)) {
                self.value_text(value)?;
            }
            stream.flow = read(value, dir).map_err(|error| error.within(self.name))?;
            return Ok(());
        }
        let text = self.value_text(value)?;
        self.set_text(disk, &text, dir).map_err(|error| error.within(self.name))
    }

    /// Returns the value as it would be written on the command line.
    fn value_text(&self, value: &RawValue) -> Result<OsString, SpecError> {
        match (value, &self.set) {
            (RawValue::Text(text), _) if !text.is_empty() => Ok(text.clone()),
            (RawValue::Bare | RawValue::Bool(true), _) if self.is_switch() => Ok("on".into()),
            (RawValue::Bool(false), _) if self.is_switch() => Ok("off".into()),
            (
                RawValue::Integer(number, _),
                KeySetter::Size(_)
                | KeySetter::StreamSize(_)
                | KeySetter::RemoteSize(_)
                | KeySetter::RemoteOrdinal(_)
                | KeySetter::Id(_)
                | KeySetter::Ordinal(_),
            ) => Ok(number.to_string().into()),
            // `0o644` is unambiguous; a decimal 644 may be meant as octal.
            (RawValue::Integer(number, 8), KeySetter::Perm(_)) => Ok(format!("{number:o}").into()),
            (RawValue::Bare | RawValue::Text(_), _) => {
                let why = format!("needs a value: write {}={}", self.name, self.sample);
                Err(SpecError::key(self.name, why))
            }
            (RawValue::Integer(..), _) => Err(self.wrong_type("a number")),
            (RawValue::Bool(_), _) => Err(self.wrong_type("a boolean")),
            (RawValue::Array(_), _) => Err(self.wrong_type("an array")),
            (RawValue::Other(kind), _) => Err(self.wrong_type(kind)),
        }
    }

    /// Returns whether the key alone, without a value, means "on".
    fn is_switch(&self) -> bool {
        matches!(
            self.set,
            KeySetter::Switch(_) | KeySetter::StreamSwitch(_) | KeySetter::StreamSwitchWord(_)
        )
    }

    fn wrong_type(&self, kind: &str) -> SpecError {
        let (name, sample) = (self.name, self.sample);
        SpecError::key(name, format!("cannot be {kind}: write {name} = \"{sample}\""))
    }

    fn set_text(&self, disk: &mut DiskSpec, text: &OsStr, dir: &Path) -> Result<(), SpecError> {
        let no_text = || format!("UTF-8: write it as in {}={}", self.name, self.sample);
        let word = || text.to_str().ok_or_else(|| SpecError::value(text, no_text()));
        match &self.set {
            KeySetter::Switch(set) => set(disk, parse_switch(word()?)?),
            KeySetter::Size(set) => set(disk, parse_size(word()?)?)?,
            KeySetter::Id(set) => set(disk, parse_id(word()?)?),
            KeySetter::Ordinal(set) => set(disk, parse_ordinal(word()?)?),
            KeySetter::Perm(set) => set(disk, parse_perm(word()?)?),
            KeySetter::Word(set) => set(disk, word()?)?,
            KeySetter::Path(set) => set(disk, absolute(text, dir)?),
            KeySetter::RemoteSize(set) => set(remote_mut(disk)?, parse_size(word()?)?)?,
            KeySetter::RemoteOrdinal(set) => set(remote_mut(disk)?, parse_ordinal(word()?)?)?,
            KeySetter::RemotePath(set) => set(remote_mut(disk)?, absolute(text, dir)?),
            KeySetter::RemoteText(set) => set(remote_mut(disk)?, text, dir)?,
            KeySetter::StreamSize(set) => set(stream_mut(disk)?, parse_size(word()?)?),
            KeySetter::StreamWord(set) | KeySetter::StreamSwitchWord(set) => {
                set(stream_mut(disk)?, word()?)?;
            }
            KeySetter::StreamSwitch(set) => set(stream_mut(disk)?, parse_switch(word()?)?)?,
            // Handled in `set_value`.
            KeySetter::Flow(_) => {}
        }
        Ok(())
    }

    /// Checks the key against the final mode or direction of the disk.
    pub(super) fn check(&self, disk: &DiskSpec) -> Result<(), SpecError> {
        if let DiskSource::Stream(stream) = &disk.source {
            let why = match (self.scope, &stream.flow) {
                (KeyScope::Outputs, Flow::In { .. }) => {
                    "is for output streams, and this one has from="
                }
                (KeyScope::Inputs, Flow::Out(_)) => "is for input streams, and this one has to=",
                _ => return Ok(()),
            };
            return Err(SpecError::key(self.name, format!("{why}: drop it")));
        }
        match (self.scope, &disk.source, disk.mode) {
            (KeyScope::Files | KeyScope::HostFiles, DiskSource::Blank(_), _) => {
                let why = "is for files, and this disk is blank: drop it";
                Err(SpecError::key(self.name, why))
            }
            (KeyScope::Cow, _, mode @ (DiskMode::ReadOnly | DiskMode::ReadWrite)) => {
                let why =
                    format!("is for mode=cow, and this disk is mode={mode}: drop one of them");
                Err(SpecError::key(self.name, why))
            }
            _ => Ok(()),
        }
    }
}

fn stream_mut(disk: &mut DiskSpec) -> Result<&mut StreamSpec, SpecError> {
    match &mut disk.source {
        DiskSource::Stream(stream) => Ok(stream),
        _ => Err(SpecError::Missing("not a stream")),
    }
}

fn remote_mut(disk: &mut DiskSpec) -> Result<&mut RemoteSpec, SpecError> {
    match &mut disk.source {
        DiskSource::Remote(remote) => Ok(remote),
        _ => Err(SpecError::Missing("not an image on a server")),
    }
}

fn parse_switch(text: &str) -> Result<Switch, SpecError> {
    error::parse_choice("setting", text, &[("on", Switch::On), ("off", Switch::Off)])
}

/// Parses a user or group ID. The largest number is none: chown(2) takes it as "unchanged".
fn parse_id(text: &str) -> Result<u32, SpecError> {
    let id = parse_decimal(text).and_then(|id| u32::try_from(id).ok()).filter(|id| *id != u32::MAX);
    id.ok_or_else(|| {
        SpecError::value(text, "a user's or group's number: take one from 0 to 4294967294")
    })
}

/// Parses a number that counts from 1.
fn parse_ordinal(text: &str) -> Result<u32, SpecError> {
    let number = parse_decimal(text).and_then(|number| u32::try_from(number).ok());
    number
        .filter(|number| *number > 0)
        .ok_or_else(|| SpecError::value(text, "a number: count from 1, as in partition=1"))
}

/// Parses permission bits in octal, with or without a leading zero.
fn parse_perm(text: &str) -> Result<u16, SpecError> {
    let is_octal = text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let perm = u16::from_str_radix(text, 8).ok().filter(|perm| is_octal && *perm <= 0o777);
    perm.ok_or_else(|| SpecError::value(text, "a mode: write it in octal, 0 to 0777, as in 0644"))
}
