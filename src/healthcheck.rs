//! Asks the running service whether it is ready: for `HEALTHCHECK` in an image without a shell.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// The service answers in milliseconds when it is well.
const PATIENCE: Duration = Duration::from_secs(3);
/// The answer is a status line, a few headers and a sentence.
const MAX_ANSWER: u64 = 16 * 1024;

/// Asks `/readyz` of the service that listens on `listen`.
///
/// # Errors
/// Why it is not ready, in one line.
pub async fn ask(listen: SocketAddr, tls: bool) -> Result<(), String> {
    let address = reachable(listen);
    let failed = |why: String| format!("not ready: {why} ({address})");
    match tokio::time::timeout(PATIENCE, answer(address, tls)).await {
        Ok(Ok(answer)) => verdict(&answer).map_err(failed),
        Ok(Err(error)) => Err(failed(error.to_string())),
        Err(_) => Err(failed(format!("no answer within {PATIENCE:?}"))),
    }
}

/// Where a listener on all addresses is reached from the same machine.
fn reachable(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    SocketAddr::new(ip, listen.port())
}

async fn answer(address: SocketAddr, tls: bool) -> io::Result<Vec<u8>> {
    let stream = TcpStream::connect(address).await?;
    if !tls {
        return exchange(stream, address).await;
    }
    let connector = TlsConnector::from(Arc::new(client_config()));
    exchange(
        connector
            .connect(ServerName::from(address.ip()), stream)
            .await?,
        address,
    )
    .await
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    address: SocketAddr,
) -> io::Result<Vec<u8>> {
    let request = format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    stream.flush().await?;
    let mut answer = Vec::new();
    match stream.take(MAX_ANSWER).read_to_end(&mut answer).await {
        // Some end TLS without saying goodbye; what has come is judged.
        Err(error) if answer.is_empty() => Err(error),
        _ => Ok(answer),
    }
}

fn verdict(answer: &[u8]) -> Result<(), String> {
    let text = String::from_utf8_lossy(answer);
    let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
    let status = head.lines().next().unwrap_or_default();
    match status
        .strip_prefix("HTTP/1.1 ")
        .and_then(|rest| rest.split(' ').next())
    {
        Some("200") => Ok(()),
        Some(code) => Err(
            format!("{code} {}", body.lines().next().unwrap_or_default())
                .trim_end()
                .into(),
        ),
        None => {
            Err("the answer is no HTTP; is listen.tls what the service was started with?".into())
        }
    }
}

fn client_config() -> ClientConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = Arc::new(AnyCertificate(Arc::clone(&provider)));
    ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has the default versions")
        .dangerous()
        .with_custom_certificate_verifier(verifier)
        .with_no_client_auth()
}

/// SECURITY: takes any certificate. The health check asks its own machine, at an address where the certificate cannot
/// be valid; it sends no secret and believes nothing of the answer but one bit. Nothing else may use this.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(
            message,
            cert,
            signature,
            &self.0.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[test]
    fn a_listener_on_all_addresses_is_asked_on_the_loopback() {
        for (listen, asked) in [
            ("0.0.0.0:8080", "127.0.0.1:8080"),
            ("[::]:8080", "[::1]:8080"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("192.0.2.1:80", "192.0.2.1:80"),
        ] {
            assert_eq!(reachable(listen.parse().unwrap()), asked.parse().unwrap());
        }
    }

    async fn ask_one_that_says(answer: &'static str) -> Result<(), String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..length]).into_owned()
        });
        let result = ask(address, false).await;
        let request = server.await.unwrap();
        assert!(
            request.starts_with(&format!("GET /readyz HTTP/1.1\r\nHost: {address}\r\n")),
            "{request}"
        );
        result
    }

    #[tokio::test]
    async fn only_200_is_ready() {
        assert_eq!(
            ask_one_that_says("HTTP/1.1 200 OK\r\n\r\nready").await,
            Ok(())
        );
        let error = ask_one_that_says("HTTP/1.1 503 Service Unavailable\r\n\r\ndraining\n")
            .await
            .unwrap_err();
        assert!(error.starts_with("not ready: 503 draining ("), "{error}");
        assert!(
            ask_one_that_says("\u{15}\u{3}")
                .await
                .unwrap_err()
                .contains("no HTTP")
        );
        assert!(ask_one_that_says("").await.is_err());
    }

    #[tokio::test]
    async fn any_certificate_will_do() {
        let made = rcgen::generate_simple_self_signed(["warmdock.example".to_string()]).unwrap();
        let key = made.signing_key.serialize_der().try_into().unwrap();
        let config =
            rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_no_client_auth()
                .with_single_cert(vec![made.cert.der().clone()], key)
                .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = acceptor.accept(stream).await.unwrap();
            let mut request = [0; 1024];
            let length = stream.read(&mut request).await.unwrap();
            assert!(request[..length].starts_with(b"GET /readyz "));
            stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
            // Closed without TLS's goodbye, as some do.
            stream.flush().await.unwrap();
        });
        assert_eq!(ask(address, true).await, Ok(()));
        server.await.unwrap();
    }

    #[tokio::test]
    async fn nobody_there_is_not_ready() {
        let free = TcpListener::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap();
        let error = ask(free, false).await.unwrap_err();
        assert!(
            !error.contains('\n') && error.contains(&free.to_string()),
            "{error}"
        );
    }
}
