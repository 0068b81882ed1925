//! Notifications to the service manager (sd_notify(3)).

use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// State of the service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ServiceState {
    /// The mount answers requests.
    Ready,
    /// The mount is being unmounted.
    Stopping,
}

/// Sends `state` to `$NOTIFY_SOCKET`, if that is set. A failure is logged, because the service
/// manager will wait in vain, and the log should say why.
pub(super) fn notify(state: ServiceState) {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
        return;
    };
    let word: &[u8] = match state {
        ServiceState::Ready => b"READY=1\n",
        ServiceState::Stopping => b"STOPPING=1\n",
    };
    if let Err(error) = send(&socket, word) {
        log::warn!("cannot tell $NOTIFY_SOCKET '{}': {error}", socket.display());
    }
}

/// Sends `word` to the socket called `name`; a leading `@` denotes an abstract socket.
fn send(name: &OsStr, word: &[u8]) -> io::Result<()> {
    let address = match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(name)?,
        _ => {
            let line = "neither a path nor the name of an abstract socket";
            return Err(io::Error::new(io::ErrorKind::Unsupported, line));
        }
    };
    UnixDatagram::unbound()?.send_to_addr(word, &address).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notify_reaches_path_and_abstract_sockets() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        let name = format!("cowslip-notify-{}", std::process::id());
        let named = UnixDatagram::bind(&path).unwrap();
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let nameless = UnixDatagram::bind_addr(&address).unwrap();
        let mut buf = [0; 100];
        for (socket, name) in
            [(named, path.into_os_string()), (nameless, format!("@{name}").into())]
        {
            send(&name, b"READY=1\n").unwrap();
            let len = socket.recv(&mut buf).unwrap();
            assert_eq!(&buf[..len], b"READY=1\n");
        }
        assert!(send(OsStr::new("vsock:2:1"), b"").is_err());
    }
}
