//! What is said before anything is agreed on: both sides' identifications (RFC 4253, 4.2), and the client's list of
//! algorithms (7.1), which is read ahead, for what we offer depends on it.
//!
//! Among what both sides know, the client's order decides. OpenSSH's begins with ChaCha20, which costs either side about
//! twice what AES-GCM does on a processor with instructions for it. So a client that knows AES-GCM is offered nothing else
//! by such a machine, and every other client all that we have.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use russh::cipher;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

/// What clients are offered that know it, where [`has_instructions`].
pub const AES_GCM: &[cipher::Name] = &[cipher::AES_256_GCM, cipher::AES_128_GCM];

/// Clients send their list when they have our identification. One that waits for our list is offered everything.
const PATIENCE: Duration = Duration::from_secs(1);
/// Before keys are exchanged, no packet may be larger (RFC 4253, 6.1); OpenSSH's list has 1.5 kB.
const MOST: usize = 35_000;
/// The number of the message SSH_MSG_KEXINIT, and what stands before its lists: that and a cookie.
const KEXINIT: u8 = 20;
const BEFORE_LISTS: usize = 1 + 16;
/// Key exchanges, host keys, ciphers of the client, ciphers of the server.
const CIPHER_LISTS: [usize; 2] = [2, 3];

/// A connection on which greetings are exchanged: what came with the client's is read once more by russh, and what russh
/// says first was said.
pub struct Greeted<T> {
    inner: T,
    read_ahead: Vec<u8>,
    /// Bytes of `read_ahead` that were read once more.
    repeated: usize,
    /// Bytes of our greeting that are still to be taken without being sent.
    said: usize,
    pub knows_aes_gcm: bool,
}

/// Sends our identification `id` and reads the client's with its algorithms.
///
/// # Errors
/// When the connection ends or fails.
pub async fn exchange<T: AsyncRead + AsyncWrite + Unpin>(
    mut stream: T,
    id: &str,
) -> io::Result<Greeted<T>> {
    let greeting = format!("{id}\r\n");
    stream.write_all(greeting.as_bytes()).await?;
    stream.flush().await?;
    let mut read_ahead = Vec::with_capacity(4096);
    let reading = async {
        while read_ahead.len() < MOST {
            if let Some(packet) = first_packet(&read_ahead) {
                return Ok(packet.is_some_and(knows_aes_gcm));
            }
            if stream.read_buf(&mut read_ahead).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof));
            }
        }
        Ok(false)
    };
    // Whatever was read until then is kept.
    let knows_aes_gcm = timeout(PATIENCE, reading).await.unwrap_or(Ok(false))?;
    Ok(Greeted {
        inner: stream,
        read_ahead,
        repeated: 0,
        said: greeting.len(),
        knows_aes_gcm,
    })
}

/// The payload of the first packet behind the line of identification: `None` while more has to be read for it, and
/// `Some(None)` if there will be none.
fn first_packet(read: &[u8]) -> Option<Option<&[u8]>> {
    let line = read.iter().position(|byte| *byte == b'\n')? + 1;
    if !read.starts_with(b"SSH-") {
        return Some(None);
    }
    let (length, rest) = read[line..].split_first_chunk::<4>()?;
    let length = u32::from_be_bytes(*length) as usize;
    if length > MOST {
        return Some(None);
    }
    let packet = rest.get(..length)?;
    Some(
        packet
            .split_first()
            .and_then(|(padding, rest)| rest.get(..rest.len().checked_sub(usize::from(*padding))?)),
    )
}

/// Whether a client with these algorithms, the payload of a packet, knows a cipher of AES-GCM for both directions.
fn knows_aes_gcm(payload: &[u8]) -> bool {
    if payload.first() != Some(&KEXINIT) {
        return false;
    }
    let mut rest = payload.get(BEFORE_LISTS..).unwrap_or_default();
    let lists: Vec<&[u8]> = std::iter::from_fn(|| {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let (list, behind) = behind.split_at_checked(u32::from_be_bytes(*length) as usize)?;
        rest = behind;
        Some(list)
    })
    .take(CIPHER_LISTS[1] + 1)
    .collect();
    CIPHER_LISTS.into_iter().all(|index| {
        let names = lists.get(index).copied().unwrap_or_default();
        names.split(|byte| *byte == b',').any(|name| {
            let is = |cipher: &cipher::Name| cipher.as_ref().as_bytes() == name;
            AES_GCM.iter().any(is)
        })
    })
}

/// Whether this processor has instructions for AES-GCM.
pub fn has_instructions() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    #[cfg(target_arch = "aarch64")]
    return std::arch::is_aarch64_feature_detected!("aes");
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    false
}

impl<T: AsyncRead + Unpin> AsyncRead for Greeted<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let left = &self.read_ahead[self.repeated..];
        if left.is_empty() {
            return Pin::new(&mut self.inner).poll_read(cx, buf);
        }
        let taken = left.len().min(buf.remaining());
        buf.put_slice(&left[..taken]);
        self.repeated += taken;
        if self.repeated == self.read_ahead.len() {
            (self.read_ahead, self.repeated) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Greeted<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if self.said == 0 {
            return Pin::new(&mut self.inner).poll_write(cx, bytes);
        }
        let taken = self.said.min(bytes.len());
        self.said -= taken;
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::Instant;

    use super::*;

    const ID: &str = "SSH-2.0-server";
    const CHACHA: &str = "chacha20-poly1305@openssh.com";

    /// A client's identification and list, with the ciphers for its packets and for ours.
    fn client(mine: &str, yours: &str) -> Vec<u8> {
        let mut payload = vec![KEXINIT];
        payload.extend([7; 16]);
        for list in ["curve25519-sha256", "ssh-ed25519", mine, yours, "", ""] {
            payload.extend((list.len() as u32).to_be_bytes());
            payload.extend(list.as_bytes());
        }
        let mut packet = vec![4];
        packet.extend(&payload);
        packet.extend([0; 4]);
        let mut all = b"SSH-2.0-client comment\r\n".to_vec();
        all.extend((packet.len() as u32).to_be_bytes());
        all.extend(packet);
        all
    }

    /// What is found out about a client that sends `bytes` and waits; and whether it is all read once more.
    async fn greet(bytes: &[u8]) -> bool {
        let (ours, mut theirs) = duplex(1 << 20);
        theirs.write_all(bytes).await.unwrap();
        let mut greeted = exchange(ours, ID).await.unwrap();
        // As russh does it.
        greeted.write_all(b"SSH-2.0-server\r\nnext").await.unwrap();
        let mut heard = [0; 20];
        theirs.read_exact(&mut heard).await.unwrap();
        assert_eq!(&heard, b"SSH-2.0-server\r\nnext");
        theirs.write_all(b"more").await.unwrap();
        theirs.shutdown().await.unwrap();
        let mut read = Vec::new();
        greeted.read_to_end(&mut read).await.unwrap();
        assert_eq!(read, [bytes, b"more"].concat());
        greeted.knows_aes_gcm
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_knows_aes_gcm_if_both_of_its_lists_have_it() {
        let both = format!("{CHACHA},aes128-ctr,aes128-gcm@openssh.com");
        assert!(greet(&client(&both, &both)).await);
        assert!(greet(&client("aes256-gcm@openssh.com", &both)).await);
        assert!(!greet(&client(&both, CHACHA)).await);
        assert!(!greet(&client(CHACHA, &both)).await);
        assert!(!greet(&client("", "")).await);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_no_list_is_left_to_russh() {
        let begun = Instant::now();
        let list = client("aes256-gcm@openssh.com", "aes256-gcm@openssh.com");
        let begins_with_text = [b"hello\n".as_slice(), &list].concat();
        assert!(!greet(&begins_with_text).await);
        let mut huge = list.clone();
        huge[24..28].copy_from_slice(&u32::MAX.to_be_bytes());
        assert!(!greet(&huge).await);
        let mut other_message = list.clone();
        other_message[29] = 2;
        assert!(!greet(&other_message).await);
        let mut all_padding = list.clone();
        all_padding[28] = 255;
        assert!(!greet(&all_padding).await);
        assert!(!greet(&vec![b'x'; MOST + 1]).await);
        // At once.
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_waits_for_our_list_is_not_waited_for() {
        let list = client("aes256-gcm@openssh.com", "aes256-gcm@openssh.com");
        for sent in 0..list.len() {
            assert!(!greet(&list[..sent]).await);
        }
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_an_error() {
        let (ours, mut theirs) = duplex(1 << 20);
        theirs.write_all(b"SSH-2.0-client\r\n").await.unwrap();
        drop(theirs);
        assert!(exchange(ours, ID).await.is_err());
    }
}
