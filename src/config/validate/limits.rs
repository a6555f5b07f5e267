//! The section `limits`.

use std::time::Duration;

use super::Validator;
use crate::config::Limits;
use crate::config::file::LimitsFile;

impl Validator<'_> {
    pub(super) fn limits(&mut self, file: &LimitsFile) -> Option<Limits> {
        // A timeout of nothing would refuse everybody.
        let shortest = Duration::from_millis(10);
        let connections = self.count("limits.connections", &file.connections, 1..=1_000_000);
        let tls_handshake_timeout = self.span(
            "limits.tls_handshake_timeout",
            &file.tls_handshake_timeout,
            shortest,
        );
        let ssh_login_timeout = self.span(
            "limits.ssh_login_timeout",
            &file.ssh_login_timeout,
            shortest,
        );
        let header_timeout = self.span("limits.header_timeout", &file.header_timeout, shortest);
        let body_idle_timeout = self.span(
            "limits.body_idle_timeout",
            &file.body_idle_timeout,
            shortest,
        );
        let drain_timeout = self.span("limits.drain_timeout", &file.drain_timeout, Duration::ZERO);
        let request_body = self.size("limits.request_body", &file.request_body);
        let packs_per_repo = self.count("limits.packs_per_repo", &file.packs_per_repo, 1..=100_000);
        let packs_queue_per_repo = self.count(
            "limits.packs_queue_per_repo",
            &file.packs_queue_per_repo,
            0..=100_000,
        );
        let pack_threads = self.count("limits.pack_threads", &file.pack_threads, 0..=1024);
        let upstream_idle_timeout = self.span(
            "limits.upstream_idle_timeout",
            &file.upstream_idle_timeout,
            shortest,
        );
        let first_clone_timeout = self.span(
            "limits.first_clone_timeout",
            &file.first_clone_timeout,
            shortest,
        );
        Some(Limits {
            connections: connections?,
            tls_handshake_timeout: tls_handshake_timeout?,
            ssh_login_timeout: ssh_login_timeout?,
            header_timeout: header_timeout?,
            body_idle_timeout: body_idle_timeout?,
            drain_timeout: drain_timeout?,
            request_body: request_body?,
            packs_per_repo: packs_per_repo?,
            packs_queue_per_repo: packs_queue_per_repo?,
            pack_threads: pack_threads?,
            upstream_idle_timeout: upstream_idle_timeout?,
            first_clone_timeout: first_clone_timeout?,
        })
    }
}
