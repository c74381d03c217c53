// Goroutines that move money between accounts, make garbage, and recover from nil dereferences.
package main

import (
	"fmt"
	"math/rand"
	"os"
	"sync"
	"time"
)

type account struct {
	balance int
	next    *account
}

var (
	accounts [1000]*account
	lock     sync.Mutex
	sink     [64][]byte
)

func fault() {
	defer func() {
		if recover() == nil {
			fmt.Println("WRONG no fault")
			os.Exit(3)
		}
	}()
	accounts[0].next.balance++
}

func work(seed int64) {
	draw := rand.New(rand.NewSource(seed))
	for {
		lock.Lock()
		for i := 0; i < 50; i++ {
			a, b := draw.Intn(1000), draw.Intn(1000)
			accounts[a] = &account{balance: accounts[a].balance - 1}
			accounts[b] = &account{balance: accounts[b].balance + 1}
			sink[draw.Intn(64)] = make([]byte, draw.Intn(4000))
		}
		fault()
		lock.Unlock()
	}
}

func main() {
	for i := range accounts {
		accounts[i] = &account{balance: 100}
	}
	for i := 0; i < 4; i++ {
		go work(int64(i))
	}
	for tick := 1; ; tick++ {
		time.Sleep(100 * time.Millisecond)
		lock.Lock()
		sum := 0
		for _, a := range accounts {
			sum += a.balance
		}
		lock.Unlock()
		if sum != 100000 {
			fmt.Println("WRONG sum", sum)
			os.Exit(3)
		}
		fmt.Println("tick", tick)
	}
}
