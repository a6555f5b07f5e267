//! The client side of Git's fetch protocol, over any transport: gix's Git client, told to take all that a mirror lacks.

use std::io::BufRead;

use gix_hash::ObjectId;
use gix_object::bstr::BString;
use gix_protocol::fetch::{Arguments, Negotiate, Options, Response, Shallow, Tags, negotiate};
use gix_protocol::handshake::Ref;
use gix_transport::client::blocking_io::Transport;
use gix_utils::progress::Discard;

use super::pack::{last_cause, receive};
use super::patience::Patience;
use super::{FetchJob, Fetched, LONGEST_NAME, PackJob, UpstreamError, is_mirrored};
use crate::git::refs::{Head, Refs, Target};

/// Hosts of Git look at the beginning: what is no `git/` gets web pages from some.
pub(super) const AGENT: &str = concat!("git/2 (warmdock ", env!("CARGO_PKG_VERSION"), ")");

/// Fetches what the mirror lacks, with the `patience` of the transport. One that stays open is told at the end that nothing
/// more is asked.
///
/// # Errors
/// [`UpstreamError`], without the name of the host.
pub(super) fn fetch(
    mut transport: impl Transport,
    patience: &Patience,
    namespaces: &[String],
    job: FetchJob<'_>,
) -> Result<Fetched, UpstreamError> {
    let fetched = fetch_over(&mut transport, patience, namespaces, job);
    let fetched = fetched.map_err(|error| match patience.hopeless() {
        Some(why) => UpstreamError::Hopeless(why),
        None => error,
    })?;
    // What was fetched is whole; that a peer does not hear our goodbye is no error.
    let _ = gix_protocol::indicate_end_of_interaction(&mut transport, false);
    Ok(fetched)
}

fn fetch_over(
    // Behind a pointer, or gix's client would be in the binary once for each.
    mut transport: &mut dyn Transport,
    patience: &Patience,
    namespaces: &[String],
    job: FetchJob<'_>,
) -> Result<Fetched, UpstreamError> {
    let mut handshake = gix_protocol::handshake(
        &mut *transport,
        gix_transport::Service::UploadPack,
        |_| Ok(None),
        Vec::new(),
        &mut Discard,
    )
    .map_err(failed)?;
    let format = handshake.capabilities.capability("object-format");
    if format
        .and_then(|format| format.value().map(|value| value != "sha1"))
        .unwrap_or(false)
    {
        return Err(UpstreamError::Sha256);
    }
    let agent = ("agent", Some(AGENT.replace([' ', '(', ')'], "-")));
    let listed = match handshake.refs.take() {
        Some(listed) => listed,
        None => {
            let mut prefixes = gix_protocol::ls_refs::RefPrefixes::new();
            prefixes.extend(
                ["HEAD".to_owned()]
                    .iter()
                    .chain(namespaces)
                    .map(|name| BString::from(name.as_str())),
            );
            gix_protocol::LsRefsCommand::new(Some(prefixes), &handshake.capabilities, agent.clone())
                .invoke_blocking(&mut *transport, &mut Discard, false)
                .map_err(failed)?
        }
    };
    patience.has_listed();
    let refs = refs_of(listed, namespaces);
    (job.on_refs)(&refs);

    let FetchJob { pack, stop, .. } = job;
    let Some(pack) = pack else {
        return Ok(Fetched { refs, index: None });
    };
    let PackJob {
        local,
        haves,
        folder,
        progress,
        reservation,
    } = pack;
    let mut wants: Vec<ObjectId> = refs.tips().filter(|tip| !local.contains(tip)).collect();
    wants.sort_unstable();
    wants.dedup();
    if wants.is_empty() {
        return Ok(Fetched { refs, index: None });
    }
    let mut received = None;
    let consume =
        |input: &mut dyn BufRead, _: &mut dyn gix_utils::progress::DynNestedProgress, _: &_| {
            received = Some(receive(input, local, folder, progress, stop, reservation));
            Ok(matches!(received, Some(Ok(_))))
        };
    let outcome = gix_protocol::fetch(
        &mut AllAtOnce { wants, haves },
        consume,
        Discard,
        stop,
        gix_protocol::fetch::Context {
            handshake: &mut handshake,
            transport: &mut transport,
            user_agent: agent,
            trace_packetlines: false,
        },
        Options {
            // A mirror is whole: there is no such file, and an upstream that is shallow itself is refused.
            shallow_file: folder.join("shallow"),
            shallow: &Shallow::NoChange,
            tags: Tags::None,
            reject_shallow_remote: true,
        },
    );
    match (received, outcome) {
        (Some(Err(error)), _) => Err(error),
        (_, Err(error)) => Err(failed(error)),
        (Some(Ok(index)), Ok(_)) => Ok(Fetched { refs, index }),
        (None, Ok(_)) => Err(UpstreamError::Failed(
            "it sent no pack for what it had offered".to_owned(),
        )),
    }
}

pub(super) fn failed(error: gix_error::Error) -> UpstreamError {
    UpstreamError::Failed(last_cause(&error))
}

fn refs_of(listed: Vec<Ref>, namespaces: &[String]) -> Refs {
    let mut refs = Refs::default();
    let mut head_id = None;
    let mut symrefs = Vec::new();
    for listed in listed {
        let (name, target) = match listed {
            Ref::Unborn {
                full_ref_name,
                target,
            } => {
                if full_ref_name == "HEAD" && is_name(&target) {
                    refs.head = Head::Branch(target);
                }
                continue;
            }
            Ref::Symbolic {
                full_ref_name,
                target,
                tag,
                object,
            } => {
                if full_ref_name == "HEAD" && is_name(&target) {
                    refs.head = Head::Branch(target);
                    continue;
                }
                symrefs.push((full_ref_name.clone(), target));
                (
                    full_ref_name,
                    Target {
                        id: tag.unwrap_or(object),
                        peeled: tag.map(|_| object),
                    },
                )
            }
            Ref::Direct {
                full_ref_name,
                object,
            } => (
                full_ref_name,
                Target {
                    id: object,
                    peeled: None,
                },
            ),
            Ref::Peeled {
                full_ref_name,
                tag,
                object,
            } => (
                full_ref_name,
                Target {
                    id: tag,
                    peeled: Some(object),
                },
            ),
        };
        if name == "HEAD" {
            head_id = Some(target.id);
        } else if is_mirrored(&name, namespaces) && is_name(&name) {
            refs.names.insert(name, target);
        }
    }
    if let (Head::Unknown, Some(id)) = (&refs.head, head_id) {
        refs.head = Head::Detached(id);
    }
    refs.set_symrefs(symrefs);
    refs
}

/// Whether an upstream's text can stand in our files and answers as the name of a reference.
fn is_name(name: &BString) -> bool {
    name.len() <= LONGEST_NAME && gix_ref::FullName::try_from(name.clone()).is_ok()
}

/// Tells what we have and want in one request, and that this is all: the upstream answers with the pack at once.
struct AllAtOnce {
    wants: Vec<ObjectId>,
    haves: Vec<ObjectId>,
}

impl Negotiate for AllAtOnce {
    fn mark_complete_and_common_ref(&mut self) -> gix_error::Result<negotiate::Action> {
        Ok(negotiate::Action::MustNegotiate {
            remote_ref_target_known: Vec::new(),
        })
    }

    fn add_wants(&mut self, arguments: &mut Arguments, _: &[bool]) -> bool {
        for want in &self.wants {
            arguments.want(want);
        }
        true
    }

    fn one_round(
        &mut self,
        _: &mut negotiate::one_round::State,
        arguments: &mut Arguments,
        _: Option<&Response>,
    ) -> gix_error::Result<(negotiate::Round, bool)> {
        for have in &self.haves {
            arguments.have(have);
        }
        let round = negotiate::Round {
            haves_sent: self.haves.len(),
            in_vain: 0,
            haves_to_send: 0,
            previous_response_had_at_least_one_in_common: false,
        };
        Ok((round, true))
    }
}
