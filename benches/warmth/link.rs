//! A slow link: everything that crosses it is delayed, and shares its rate in each direction.
//!
//! It is crossed as a proxy (HTTP `CONNECT`, which cargo uses for TLS), or to one fixed address.

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, sleep_until};

#[derive(Clone, Copy)]
pub struct Speed {
    /// Bytes per second in each direction.
    pub rate: u64,
    /// From one end to the other and back.
    pub round_trip: Duration,
}

/// When each direction is free for the next byte.
struct Link {
    speed: Speed,
    up: Mutex<Instant>,
    down: Mutex<Instant>,
}

/// Ethernet's packets, several at once: small enough that connections share the link fairly.
const PIECE: usize = 8 << 10;
/// What may be under way on one connection, in pieces; more than rate × round trip.
const WINDOW: usize = 64;

/// Where connections go that come to the link's end on this side.
#[derive(Clone, Copy)]
pub enum Far {
    /// Where each one says with `CONNECT host:port`.
    Proxy,
    Fixed(SocketAddr),
}

/// Opens the near ends of one link, one for each of `fars`, and returns their addresses.
pub async fn open<const N: usize>(speed: Speed, fars: [Far; N]) -> io::Result<[SocketAddr; N]> {
    let now = Instant::now();
    let link = Arc::new(Link {
        speed,
        up: Mutex::new(now),
        down: Mutex::new(now),
    });
    let mut addresses = [SocketAddr::from((Ipv4Addr::LOCALHOST, 0)); N];
    for (address, far) in addresses.iter_mut().zip(fars) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        *address = listener.local_addr()?;
        let link = Arc::clone(&link);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                tokio::spawn(carry(Arc::clone(&link), near, far));
            }
        });
    }
    Ok(addresses)
}

async fn carry(link: Arc<Link>, near: TcpStream, far: Far) -> io::Result<()> {
    near.set_nodelay(true)?;
    let mut near = BufReader::new(near);
    // A connection is open after one round trip.
    sleep(link.speed.round_trip).await;
    let far = match far {
        Far::Fixed(address) => TcpStream::connect(address).await?,
        Far::Proxy => {
            let target = connect_target(&mut near).await?;
            let far = TcpStream::connect(target).await?;
            near.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n")
                .await?;
            far
        }
    };
    far.set_nodelay(true)?;
    let (near_read, near_write) = tokio::io::split(near);
    let (far_read, far_write) = far.into_split();
    let up = pass(&link, &link.up, near_read, far_write);
    let down = pass(&link, &link.down, far_read, near_write);
    tokio::try_join!(up, down)?;
    Ok(())
}

/// `host:port` of a `CONNECT` request, whose head is read to its end.
async fn connect_target(near: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut target = None;
    loop {
        let mut line = String::new();
        near.read_line(&mut line).await?;
        let line = line.trim();
        if line.is_empty() {
            return target.ok_or_else(|| io::Error::other("expected CONNECT host:port"));
        }
        if let Some(rest) = line.strip_prefix("CONNECT ") {
            target = rest.split(' ').next().map(str::to_owned);
        }
    }
}

async fn pass(
    link: &Link,
    free: &Mutex<Instant>,
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
) -> io::Result<()> {
    let (sender, mut under_way) = mpsc::channel::<(Instant, Vec<u8>)>(WINDOW);
    let enter = async move {
        loop {
            let mut piece = vec![0; PIECE];
            let length = from.read(&mut piece).await?;
            piece.truncate(length);
            if length == 0 {
                return Ok::<(), io::Error>(());
            }
            let sent = {
                let mut free = free.lock().expect("nobody panics with it");
                let sent = (*free).max(Instant::now())
                    + Duration::from_secs_f64(length as f64 / link.speed.rate as f64);
                *free = sent;
                sent
            };
            let arrives = sent + link.speed.round_trip / 2;
            if sender.send((arrives, piece)).await.is_err() {
                return Ok(());
            }
        }
    };
    let leave = async move {
        while let Some((arrives, piece)) = under_way.recv().await {
            sleep_until(arrives).await;
            to.write_all(&piece).await?;
        }
        to.shutdown().await
    };
    tokio::try_join!(enter, leave)?;
    Ok(())
}
