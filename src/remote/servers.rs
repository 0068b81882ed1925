//! The servers whose keys this process was given apart from its disks.

use parking_lot::RwLock;

use crate::config::{AuthSource, RemoteSpec, ServerSpec};

/// For the life of this process.
static SERVERS: RwLock<Vec<ServerSpec>> = RwLock::new(Vec::new());

/// Uses the keys of `server` for the images that this process opens from now on, unless they have keys
/// of their own. Of two servers with the same prefix the one that was told first counts.
pub fn add_server(server: ServerSpec) {
    SERVERS.write().push(server);
}

/// Returns `spec` with the keys of its server: its own, or those with the longest prefix.
pub(super) fn with_server_keys(spec: &RemoteSpec) -> RemoteSpec {
    let mut spec = spec.clone();
    let files = [&spec.tls_ca, &spec.tls_cert, &spec.tls_key];
    if spec.auth.is_some() || files.into_iter().any(Option::is_some) {
        return spec;
    }
    let servers = SERVERS.read();
    let known = servers.iter().rev().filter(|server| server.is_for(&spec.address));
    if let Some(server) = known.max_by_key(|server| server.prefix().len()) {
        let RemoteSpec { tls_ca, tls_cert, tls_key, auth, .. } = server.keys().clone();
        if matches!(auth, Some(AuthSource::Command(_))) {
            server.keys().dir.clone_into(&mut spec.dir);
        }
        spec = RemoteSpec { tls_ca, tls_cert, tls_key, auth, ..spec };
    }
    spec
}
