//! Takes orders. What it does matters less than what it is built from.

use axum::{Json, Router, routing::post};
use serde::{Deserialize, Serialize};

#[derive(Deserialize)]
struct Order {
    item: String,
    amount: u32,
}

#[derive(Serialize)]
struct Receipt {
    text: String,
}

async fn order(Json(order): Json<Order>) -> Json<Receipt> {
    audit::note(&order.item);
    let amount = itoa::Buffer::new().format(order.amount).to_owned();
    Json(Receipt {
        text: format!("{amount} × {}", order.item),
    })
}

#[tokio::main]
async fn main() {
    tracing_subscriber::fmt().json().init();
    let client = reqwest::Client::new();
    tracing::info!(?client, "starts");
    let listener = tokio::net::TcpListener::bind("0.0.0.0:8080").await.expect("binds");
    axum::serve(listener, Router::new().route("/orders", post(order))).await.expect("serves");
}
