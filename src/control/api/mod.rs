//! The messages of the control files: written on one side and read on the other by the same types.
//!
//! ```text
//!   command line                                              daemon
//!   ------------                                              ------
//!   MountRequest, DiskRequest  ---- one line, to a ctl ---->  parsed, carried out
//!   Progress                   <--- every second ------------ {"progress":{...}}
//!   Outcome or Refusal         <--- the last line ----------- {"ok":{...}} or {"error":"..."}
//!   MountStatus, DiskStatus    <--- a status file ----------- one document
//! ```
//!
//! Other programs read this JSON too, and the two sides may be of different versions. So keys are
//! never renamed, removed or given another type, and their order is that of the fields here. A new
//! key has a default for the side that misses it: the daemon refuses requests with unknown keys, and
//! the command line ignores unknown keys in what it reads. `tests/it/control_text.rs` holds the text.

mod answer;
mod request;
mod status;
mod words;

pub(crate) use self::answer::{
    Answer, AnswerLine, DiffBaseRecord, DifferenceFiles, Line, Lines, Outcome, Progress, Refusal,
    SnapshotList, SnapshotRecord,
};
pub(crate) use self::request::{
    DiskRequest, HydrateAction, MountRequest, encode_request, parse_disk_request,
};
pub(crate) use self::status::{
    BlockOverlayStatus, BmapStatus, BufferStatus, DiskStatus, LayerStatus, MountStatus,
    NeededBuffers, OverlayStatus, PartitionStatus, PeerStatus, RemoteBaseStatus, StatusDocument,
    StreamStatus, UsageStatus,
};
pub(crate) use self::words::{
    DiskState, HydrationState, MountState, OverlayKindWord, Recovery, StreamDirection, StreamState,
};

#[cfg(test)]
mod tests {
    use super::*;

    fn round_trip(text: &str) -> String {
        let status: DiskStatus = serde_json::from_str(text).unwrap();
        serde_json::to_string(&status).unwrap()
    }

    #[test]
    fn status_of_another_version_is_understood() {
        let text = r#"{"name":"d","later":{"a":[1]},"state":"molten","overlay":{"path":"/ov"}}"#;
        let status: DiskStatus = serde_json::from_str(text).unwrap();
        assert_eq!((status.name.as_str(), status.size), ("d", 0));
        assert_eq!(status.state.as_str(), "molten");
        assert_eq!(status.state, DiskState::Other("molten".to_owned()));
        let overlay = status.overlay.unwrap();
        assert_eq!(overlay.path.as_deref(), Some("/ov"));
        assert!(overlay.blocks.is_some_and(|blocks| blocks.doing.is_none()));
    }

    #[test]
    fn keys_keep_their_order() {
        let text = round_trip("{}");
        assert_eq!(
            text,
            r#"{"name":"","inode":0,"path":"","size":0,"mode":"","state":"","error":null,"warning":null,"openers":0,"base":null,"overlay":null,"stream":null,"partitions":[]}"#
        );
        assert_eq!(round_trip(&text), text);
    }

    #[test]
    fn a_base_on_a_server_has_a_bmap_only_where_one_was_named() {
        let of = |remote: &str| round_trip(&format!(r#"{{"remote":{remote}}}"#));
        let plain = r#""remote":{"size":0,"fetched":0,"cached":0,"hits":0,"misses":0,"requests":0,"failures":0,"waiting":null,"outage":null}"#;
        assert!(of("{}").contains(plain));
        let bmap = r#""outage":null,"bmap":{"ranges":3,"verified":1,"mismatch":"0-4095"}}"#;
        assert!(of(r#"{"bmap":{"verified":1,"ranges":3,"mismatch":"0-4095"}}"#).contains(bmap));
    }

    #[test]
    fn base_of_a_difference_is_null_a_word_or_a_file() {
        let bases = [
            ("null", None),
            (r#""part""#, Some(DiffBaseRecord::Part)),
            (
                r#"{"path":"/b","format":"raw"}"#,
                Some(DiffBaseRecord::File { path: "/b".to_owned(), format: "raw".to_owned() }),
            ),
        ];
        for (text, base) in bases {
            assert_eq!(serde_json::to_string(&base).unwrap(), text);
            assert_eq!(serde_json::from_str::<Option<DiffBaseRecord>>(text).unwrap(), base);
        }
    }

    #[test]
    fn progress_has_both_numbers_or_none() {
        let line = |progress| serde_json::to_string(&AnswerLine::Progress(progress)).unwrap();
        assert_eq!(line(Progress::new(1, 2)), r#"{"progress":{"done":1,"total":2}}"#);
        assert_eq!(line(Progress::default()), r#"{"progress":{}}"#);
    }
}
