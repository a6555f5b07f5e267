//! Requests of all versions: none may end in a panic, and what is answered is made of packets.

use std::sync::{Arc, LazyLock, RwLock};

use gix_object::bstr::BString;
use warmdock::git::objects::commits::Commits;
use warmdock::git::objects::packs::PackSet;
use warmdock::git::refs::{Head, Refs, Target};
use warmdock::git::snapshot::Snapshot;
use warmdock::git::upload_pack::advertise::{Advertisements, WantPolicy};
use warmdock::git::upload_pack::pktline::{Packet, Packets};
use warmdock::git::upload_pack::{Refusal, error_packet, v0, v2};

/// Has no objects, so that every want is refused, and what is not about objects is answered.
static EMPTY: LazyLock<Snapshot> = LazyLock::new(|| {
    let commits = Arc::new(RwLock::new(Commits::default()));
    Snapshot::new(PackSet::default(), Refs::default(), commits, false).expect("an empty mirror")
});

static REFS: LazyLock<Refs> = LazyLock::new(|| {
    let names = [
        "refs/heads/a",
        "refs/heads/ab",
        "refs/heads/b",
        "refs/tags/v1",
    ];
    let id = "1".repeat(40).parse().expect("an id");
    let target = Target {
        id,
        peeled: Some(id),
    };
    Refs {
        head: Head::Branch("refs/heads/a".into()),
        names: names.map(|name| (BString::from(name), target)).into(),
        ..Refs::default()
    }
});

/// Panics where it does not hold.
pub fn check(bytes: &[u8]) {
    match v0::parse(bytes) {
        Ok(request) => {
            v0::certain_head(&request);
            answered(
                v0::respond(&request, &EMPTY, WantPolicy::Reachable).map(|answer| answer.head),
            );
        }
        Err(refusal) => answered(Err(refusal)),
    }
    match v2::parse(bytes) {
        Ok(v2::Command::Fetch(request)) => {
            v2::certain_head(&request, &REFS);
            answered(v2::fetch(*request, &EMPTY, WantPolicy::Reachable).map(|answer| answer.head));
        }
        Ok(v2::Command::LsRefs(arguments)) => {
            let list = Advertisements::default().ls_refs(&REFS, &arguments);
            answered(Ok(list.to_vec()));
        }
        Ok(v2::Command::Nothing) => {}
        Err(refusal) => answered(Err(refusal)),
    }
}

fn answered(answer: Result<Vec<u8>, Refusal>) {
    let bytes = answer.unwrap_or_else(|refusal| {
        assert!(!matches!(refusal, Refusal::Mirror(_)), "{refusal}");
        error_packet(&refusal.to_string())
    });
    let mut packets = Packets::new(&bytes);
    while let Some(packet) = packets.next_packet().expect("an answer of packets") {
        assert_ne!(packet, Packet::Data(b""));
    }
}
